#!/bin/sh
# Repeats table 1 from nothing: sh docs/results/tutorial_claim.sh FOLDER WEIGHTS. FOLDER has CIFAR-10 as train/<class>/*
# and test/<class>/*, WEIGHTS is resnet56-4bfd9763.th of github.com/akamaster/pytorch_resnet_cifar10.
set -e
run() { python -m kdpipe dataset=image_folder dataset.root="$DATA" tracking.experiment=tutorial_claim "$@"; }
DATA=$1

run experiment=teacher model=resnet56 model.weights="$2" train.epochs=1 optimizer=sgd optimizer.lr=0.02 \
    scheduler=cosine scheduler.warmup_epochs=0 augmentation=crop_flip train.threads=2

# The first epochs of 26 are those of 10, because the learning rate is constant.
student() {
    run -m model=student_cnn model@teacher=resnet56 train.epochs=26 train.test_each_epoch=true train.threads=1 "$@"
}
student seed='range(5)' loss=cross_entropy
student seed='range(5)' loss=kd loss.alpha=0.9 loss.temperature=4
student seed='range(5)' loss=kd loss.alpha=0.5 loss.temperature=5
student seed='range(5)' loss=kd_tutorial loss.alpha=0.5 loss.temperature=5 train.epochs=10
student seed='range(3)' loss=label_smoothing
python -m kdpipe.compare --experiment tutorial_claim --mixed --format runs --out tutorial_claim
