"""Names of a run's files, tags and metrics."""

# In a run's folder and among its artifacts.
CONFIG = "config.yaml"
PEER_WEIGHTS = "peer.safetensors"
PREDICTIONS = "predictions.csv"  # a line for each test image
CLASSES = "classes.csv"
VIEWS = "views.png"
CONFUSION, RELIABILITY, DIFFERING = "confusion.png", "reliability.png", "differing.png"
# Tags of a run.
IMAGE_SHAPE = "kdpipe.image_shape"  # of its stored images, such as 3x32x32
UNLABELLED_IMAGES = "kdpipe.unlabelled_images"  # how many it was trained on
DUPLICATES = "kdpipe.duplicates"  # images of the test and validation splits that are also in another, in words
TIMED_ON = "kdpipe.timed_on"  # the hardware of its latencies
TRIAL = "kdpipe.trial"  # its number in a search
STATE = "kdpipe.state"  # that of its trial: complete, pruned or failed
LEFT_OUT = "kdpipe.left_out"  # the search whose comparison leaves the run out: its trial is not complete
# Of metrics.
ONE_THREAD = "_1_thread"  # suffix of latencies on one CPU thread
# MLflow's pages have a section of charts for each prefix, in the order of the alphabet, and one-off numbers would come
# first. So what is measured in each epoch is there twice: also under a name of the first sections.
CHARTED = {f"{split}/{what}": f"{what}/{split}" for what in ("accuracy", "loss") for split in ("train", "val", "test")}
