"""Draw augmented training samples, so that people can look at them before training."""

from collections.abc import Sequence

from segray.config import TrainConfig
from segray.data.augmentation import Augmentation
from segray.data.classes import ClassMap
from segray.data.sample_list import Sample
from segray.plots import LabelledPicture, draw_samples
from segray.runtime.connect import count_cores
from segray.storage import get_file_name
from segray.training.sampling import ImageWeights
from segray.training.worker.feed import RankShare, StreamSettings, iterate_training
from segray.training.worker.sample_store import SampleStore


def draw_training(
    config: TrainConfig,
    samples: Sequence[Sample],
    classes: ClassMap,
    num_drawn: int,
    image_weights: ImageWeights | None = None,
) -> bytes:
    """Draw the first samples of a run, image and truth, augmented as the run will augment them; return a PNG file.

    The sample and its augmentation at a position in the stream do not depend on the batch size or the number of
    workers, so a single step of ``num_drawn`` samples holds the first samples of any run.

    Raises:
        DataError: An image or mask cannot be used.
        StorageError: Permissions, network or disk error.
    """
    steps = iterate_training(
        samples,
        SampleStore(classes, max_bytes=0),
        Augmentation(config.augmentation, config.image_size, classes.ignore_index),
        range(1),
        StreamSettings(num_drawn, seed=config.train.seed, image_weights=image_weights),
        RankShare(num_threads=config.train.num_decode_threads or count_cores()),
    )
    ((batch,),) = steps
    titles = map(get_file_name, batch.image_uris)
    return draw_samples(
        [LabelledPicture(*sample) for sample in zip(titles, batch.images.numpy(), batch.truth.numpy(), strict=True)],
        classes,
    )
