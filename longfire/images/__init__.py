"""Images with classes become batches of pixels. The files in the order of the flow:

sources.py       what a source of images gives; the images of folders
parquet.py       the images of parquet files
dataset.py       the sources of a run: all classes, what is trained on, what is kept apart
decoding.py      an encoded image -> a Pillow image, with guards
augmentation.py  a Pillow image -> pixels: cropped, mirrored, normalised, mixed
batch.py         a batch of images as tensors
batches.py       images i .. i+B of the run -> a batch; i is the whole state
"""
