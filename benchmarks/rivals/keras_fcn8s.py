"""Train FCN-8s with a frozen VGG16 as in Keras textbooks: Adam, fp32, `model.fit` over a `tf.data` pipeline.

python benchmarks/rivals/keras_fcn8s.py IMAGES MASKS --epochs 3 --batch-size 32

Runs in a separate environment with tensorflow-cpu and Pillow. Prints images per second of each epoch.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras import layers

SIDE_PX, NUM_CLASSES = 224, 12  # CamVid's 11 classes and void: textbooks have no ignored pixels.


def build_model() -> Any:
    """Return the compiled FCN-8s of Long, Shelhamer and Darrell (2015) on Keras' VGG16."""
    encoder = keras.applications.VGG16(include_top=False, weights=None, input_shape=(SIDE_PX, SIDE_PX, 3))
    encoder.trainable = False
    pool3, pool4, pool5 = (encoder.get_layer(f"block{number}_pool").output for number in (3, 4, 5))
    x = layers.Conv2D(4096, 7, padding="same", activation="relu")(pool5)
    x = layers.Dropout(0.5)(x)
    x = layers.Conv2D(4096, 1, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Conv2D(NUM_CLASSES, 1)(x)
    x = layers.Conv2DTranspose(NUM_CLASSES, 4, strides=2, padding="same", use_bias=False)(x)
    x = layers.Add()([x, layers.Conv2D(NUM_CLASSES, 1)(pool4)])
    x = layers.Conv2DTranspose(NUM_CLASSES, 4, strides=2, padding="same", use_bias=False)(x)
    x = layers.Add()([x, layers.Conv2D(NUM_CLASSES, 1)(pool3)])
    x = layers.Conv2DTranspose(NUM_CLASSES, 16, strides=8, padding="same", use_bias=False)(x)
    model = keras.Model(encoder.input, layers.Softmax()(x))
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def read(image_path: Any, mask_path: Any) -> tuple[Any, Any]:
    """Return an image and its mask at the model's size."""
    image = tf.io.decode_png(tf.io.read_file(image_path), channels=3)
    mask = tf.io.decode_png(tf.io.read_file(mask_path), channels=1)
    image = tf.image.resize(image, (SIDE_PX, SIDE_PX))
    mask = tf.image.resize(mask, (SIDE_PX, SIDE_PX), method="nearest")
    return keras.applications.vgg16.preprocess_input(image), mask


def build_clock(num_images: int) -> Any:
    """Return a callback that prints images per second of each epoch."""
    began: list[float] = []

    def end(epoch: int, logs: Any) -> None:
        print(f"\nimages/s {num_images / (time.perf_counter() - began[-1]):.3f}", flush=True)

    return keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: began.append(time.perf_counter()), on_epoch_end=end
    )


def main() -> None:
    """Train the network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    names = sorted(path.name for path in arguments.images.iterdir())
    paths = ([str(folder / name) for name in names] for folder in (arguments.images, arguments.masks))
    pairs = tf.data.Dataset.from_tensor_slices(tuple(paths)).map(read, num_parallel_calls=tf.data.AUTOTUNE).cache()
    batches = pairs.shuffle(len(names)).batch(arguments.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    num_images = len(names) // arguments.batch_size * arguments.batch_size
    build_model().fit(batches, epochs=arguments.epochs, callbacks=[build_clock(num_images)], verbose=2)


if __name__ == "__main__":
    main()
