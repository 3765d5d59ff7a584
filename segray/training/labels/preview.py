"""Training samples as they are fed, for people to look at before they train."""

from collections.abc import Sequence

from segray.config import TrainConfig
from segray.data.augmentation import Augmentation
from segray.data.classes import ClassMap
from segray.data.manifest import Sample
from segray.plots import LabelledPicture, draw_samples
from segray.storage import get_file_name
from segray.training.worker.feed import iterate_training
from segray.training.worker.sample_store import SampleStore


def draw_training(config: TrainConfig, samples: Sequence[Sample], classes: ClassMap, num_drawn: int) -> bytes:
    """Draw the first samples of a run, image and truth, changed as the run will change them.

    A position in the stream of samples means the same sample with the same changes for any batch size and number of
    workers, so that one step of ``num_drawn`` samples is what all runs begin with.

    Raises:
        DataError: An image or mask cannot be used.
        StorageError: The store refused or failed.
    """
    steps = iterate_training(
        samples,
        SampleStore(classes, max_bytes=0),
        Augmentation(config.augmentation, config.image_size, classes.ignore_index),
        steps=range(1),
        global_batch_size=num_drawn,
        num_parts=1,
        seed=config.train.seed,
        world_rank=0,
        world_size=1,
        num_threads=config.train.num_decode_threads,
    )
    ((batch,),) = steps
    titles = map(get_file_name, batch.image_uris)
    return draw_samples(
        [LabelledPicture(*sample) for sample in zip(titles, batch.images, batch.truth, strict=True)], classes
    )
