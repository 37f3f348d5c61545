#!/bin/sh
# Repeats table 2 from nothing: sh docs/results/pytorch_tutorial.sh FOLDER, which has CIFAR-10 as train/<class>/* and
# test/<class>/*. One CPU thread, because sums over more threads round otherwise; the teacher takes an hour.
set -e
run() { python -m kdpipe dataset=image_folder dataset.root="$DATA" tracking.experiment=pytorch_tutorial "$@"; }
DATA=$1

run experiment=pytorch_tutorial_teacher
run experiment=pytorch_tutorial seed='range(10)'
python -m kdpipe.compare --experiment pytorch_tutorial --format runs --out pytorch_tutorial
