"""`convmae reconstruct`: see what a pretrained model makes of masked pictures."""

from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from convmae.data.images import open_images, read_image
from convmae.errors import UserError
from convmae.masking import random_visible
from convmae.models.autoencoder import ConvMAE
from convmae.models.encoder import PATCH, grid_of
from convmae.models.registry import load
from convmae.visualize import reconstruction_picture
