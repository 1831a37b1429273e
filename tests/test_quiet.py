"""What libraries say of images does not reach the terminal raw, neither from this process nor from loading ones."""

import subprocess
import sys

import pytest
from PIL import Image

SCRIPT = """
import sys
import torch
from convmae.data.augmentation import CenterCrop
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.data.sources import open_images
from convmae.quiet import quiet_libraries

def run():
    if not WORKERS:
        quiet_libraries()
    source = open_images(sys.argv[1])
    batches = list(build_evaluation_loader(source, CenterCrop((4, 4)), Loading(1, num_workers=WORKERS)))
    print(sum(len(batch["images"]) for batch in batches))

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    run()
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_pillow_and_readers_are_silent(tmp_path, workers):
    folder = tmp_path / "images"
    folder.mkdir()
    # A palette with transparency as bytes, of which Pillow warns when it is converted to RGB.
    image = Image.new("P", (9, 9))
    image.putpalette(list(range(256)) * 3)
    image.save(folder / "palette.png", transparency=bytes(range(256)))
    Image.new("1", (12000, 9000)).save(folder / "large.png")  # more pixels than Pillow finds safe
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("WORKERS", str(workers)))
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)
    script.write_text(SCRIPT.replace("quiet_libraries()", "pass").replace("WORKERS", "0"))
    loud = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=120)
    assert "DecompressionBombWarning" in loud.stderr  # without it, they speak
