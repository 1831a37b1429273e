"""The sample photographs that ship inside other packages."""

import pytest

from convmae import UserError
from convmae.data import demo
from convmae.data.images import RandomCrop
from convmae.data.loading import TrainingImages
from convmae.data.sources import open_images

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_each_photograph_stands_for_sixteen_samples():
    source = open_images("demo")
    assert len(source) == 256
    assert len({source.image_name(index) for index in range(256)}) == 16
    dataset = TrainingImages(source, RandomCrop((32, 32)))
    samples = [dataset[0, index][0] for index in range(16)]
    assert all(not sample["failed"] and sample["image"].float().std() > 5 for sample in samples)


def test_the_reader_names_the_file_whose_bytes_it_gives():
    reader = demo.DemoReader()
    for index in (0, 17, 255):
        file, label = reader[index]
        with file:
            assert file.read() == demo.demo_photographs()[index // 16].read_bytes()
        assert label == 0
        assert reader.filename(index, absolute=True) == str(demo.demo_photographs()[index // 16])


def test_a_package_without_a_photograph_is_named(monkeypatch):
    monkeypatch.setitem(demo._PHOTOGRAPHS, "skimage", ("data/astronaut.png", "data/nothing.png"))
    with pytest.raises(UserError, match=r"lack the demo photograph nothing\.png"):
        demo.demo_photographs()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'convmae\[demo\]'"):
        demo.demo_photographs()
