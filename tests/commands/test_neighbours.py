import shutil

import pytest
import torch
from PIL import Image

import convmae
from convmae import weights
from convmae.commands.embed import embed
from convmae.commands.neighbours import neighbours
from convmae.evaluation.feature_files import read_features
from convmae.models.classifier import Classifier
from convmae.training.engine import DeviceOptions

CPU = DeviceOptions("cpu", "float32", 0)


@pytest.fixture
def images(photographs, tmp_path):
    return shutil.copytree(photographs, tmp_path / "images")


@pytest.fixture
def features_file(images, autoencoder_file, tmp_path):
    return embed(str(images), tmp_path / "f.safetensors", autoencoder_file, engine=CPU).output


def test_a_duplicate_comes_first_and_the_query_is_left_out(images, autoencoder_file, tmp_path, capsys):
    query, *_ = sorted(images.rglob("*.png"))
    shutil.copy(query, images / "duplicate.png")
    (found,) = neighbours(str(images), query, autoencoder_file, tmp_path / "n.png", k=3, engine=CPU)
    assert found.query == str(query)
    assert found.paths[0] == str(images / "duplicate.png")
    assert found.similarities[0] == pytest.approx(1, abs=1e-5)
    assert str(query) not in found.paths
    assert len(found.paths) == 3
    assert list(found.similarities) == sorted(found.similarities, reverse=True)
    assert Image.open(tmp_path / "n.png").format == "PNG"
    assert "duplicate.png" in capsys.readouterr().out.replace("\n", "").replace(" ", "").replace("│", "")


def test_neighbours_are_those_by_cosine(images, features_file, autoencoder_file, tmp_path):
    read = read_features(features_file)
    cosine = torch.nn.functional.cosine_similarity(read.features[:, None], read.features[None], dim=2)
    cosine.fill_diagonal_(-2)
    (found,) = neighbours(str(images), read.paths[4], autoencoder_file, tmp_path / "n.png", k=20, engine=CPU)
    assert list(found.paths) == [read.paths[index] for index in cosine[4].argsort(descending=True)[:9]]
    torch.testing.assert_close(torch.tensor(found.similarities), cosine[4].sort(descending=True).values[:9])


def test_a_file_of_features_needs_the_query_only(images, features_file, autoencoder_file, tmp_path, monkeypatch):
    queries = tmp_path / "queries"
    queries.mkdir()
    for number, path in enumerate(sorted(images.rglob("*.png"))[:3]):
        Image.open(path).rotate(90).save(queries / f"{number}.png")
    from_images = neighbours(str(images), queries, autoencoder_file, tmp_path / "n.png", k=4, engine=CPU)
    seen, forward = [], Classifier.forward_features
    monkeypatch.setattr(
        Classifier, "forward_features", lambda self, images: seen.append(len(images)) or forward(self, images)
    )
    from_file = neighbours(str(features_file), queries, autoencoder_file, tmp_path / "f.png", k=4, engine=CPU)
    assert sum(seen) == 3
    assert [one.paths for one in from_file] == [one.paths for one in from_images]
    assert (tmp_path / "n.png").read_bytes() == (tmp_path / "f.png").read_bytes()


@pytest.mark.parametrize("stated", [{"image_size": 64}, {"crop_pct": 0.5}])
def test_the_file_s_image_size_and_crop_hold(images, autoencoder_file, tmp_path, stated):
    file = embed(str(images), tmp_path / "f.safetensors", autoencoder_file, **stated, engine=CPU).output
    shutil.copy(next(images.rglob("*.png")), tmp_path / "query.png")
    (found,) = neighbours(str(file), tmp_path / "query.png", autoencoder_file, tmp_path / "n.png", k=1, engine=CPU)
    assert found.similarities[0] == pytest.approx(1, abs=1e-5)


def test_grey_models_and_damaged_images(images, grey_autoencoder_file, tmp_path, capsys):
    broken, *others = sorted(images.rglob("*.png"))
    broken.write_bytes(b"no picture")
    call = {"query": others[0], "weights": grey_autoencoder_file, "output": tmp_path / "n.png", "engine": CPU}
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        neighbours(str(images), **call)
    (found,) = neighbours(str(images), k=20, skip_damaged=True, **call)
    assert sorted(found.paths) == sorted(map(str, others[1:]))
    assert str(broken) in capsys.readouterr().err


def test_mistakes_are_one_line(images, features_file, autoencoder_file, classifier_file, tmp_path):
    wide = convmae.create_autoencoder("tiny", image_size=32)
    weights.save_model(tmp_path / "wide.safetensors", wide)
    query = next(images.rglob("*.png"))
    maps = embed(str(images), tmp_path / "maps.safetensors", autoencoder_file, "stage3", engine=CPU).output
    (tmp_path / "other.safetensors").write_bytes(autoencoder_file.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "alone").mkdir()
    shutil.copy(query, tmp_path / "alone")
    output = tmp_path / "n.png"

    def call(data=images, query=query, weights=autoencoder_file, output=output, **options):
        return neighbours(str(data), query, weights, output, engine=CPU, **options)

    for wrong, message in (
        ({"data": tmp_path / "none"}, "does not exist"),
        ({"query": tmp_path / "none.png"}, "does not exist"),
        ({"query": images}, "room for 8 queries"),
        ({"query": tmp_path / "broken.png"}, "cannot be decoded"),
        ({"query": tmp_path / "broken.png", "skip_damaged": True}, "none of the images of .*broken.png"),
        ({"weights": tmp_path / "none"}, "no weights at"),
        ({"output": tmp_path / "n.txt"}, "ends in .png"),
        ({"output": query / "n.png"}, "cannot be written to"),
        ({"k": 0}, "choose 1 to 32"),
        ({"image_size": 40}, "not divisible by 16"),
        ({"data": tmp_path / "alone", "query": tmp_path / "alone" / query.name}, "no image but the query"),
        ({"data": maps}, "holds maps of stage3"),
        ({"data": tmp_path / "other.safetensors"}, "holds no features"),
        ({"data": features_file, "weights": tmp_path / "wide.safetensors"}, "was computed with other weights"),
        ({"data": features_file, "weights": classifier_file}, "was computed with other weights"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            call(**wrong)
        assert "\n" not in str(error.value)
        assert not output.exists()
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(
        embed(str(images), tmp_path / "f.parquet", autoencoder_file, skip_damaged=True, engine=CPU).output
    )
    parquet.write_table(table.replace_schema_metadata(), tmp_path / "bare.parquet")
    lists = table["features"].combine_chunks()
    plain = pyarrow.array(lists.to_pylist(), pyarrow.list_(pyarrow.float32()))
    parquet.write_table(table.set_column(1, "features", plain), tmp_path / "rewritten.parquet")
    for name, message in (("bare", "does not say how it was computed"), ("rewritten", "holds no features")):
        with pytest.raises(convmae.UserError, match=message):
            call(data=tmp_path / f"{name}.parquet")
    shutil.copy(query, tmp_path / "query.png")
    shutil.rmtree(images)
    with pytest.raises(convmae.UserError, match="cannot be opened for the picture, give the images themselves"):
        call(data=features_file, query=tmp_path / "query.png")
