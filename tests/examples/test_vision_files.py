"""What the loaders of examples/vision read, and what they refuse, naming the file."""

import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("rich")

import celeba
import nyuv2
import office
from dbmtl_kernels.bench.results import BenchError
from vision import samples
from vision.files import Arrays, Pictures, augmented

SIZE, CLASSES = (32, 64), 13
KINDS = ["image", "label", "depth", "normal"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    samples.write_arrays(root / "data", {"train": 3, "val": 2}, KINDS, SIZE, CLASSES)
    return root / "data"


@pytest.fixture
def damaged(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "data")


def test_arrays_are_read_as_they_were_written(scenes):
    data = Arrays(scenes / "train", KINDS, SIZE, CLASSES)
    assert len(data) == 3
    image, (label, depth, normal) = data[2]
    read = {kind: np.load(scenes / "train" / kind / "2.npy") for kind in KINDS}
    assert np.array_equal(image, read["image"].transpose(2, 0, 1))
    assert np.array_equal(label, read["label"])
    assert label.dtype == torch.int64
    assert np.array_equal(depth[0], read["depth"][..., 0])
    assert np.array_equal(normal, read["normal"].transpose(2, 0, 1))
    assert (label[0] == -1).all()
    assert (depth[:, -1] == 0).all()
    assert (normal[:, :, :2] == 0).all()


def test_any_negative_label_is_none(damaged):
    label = damaged / "train" / "label" / "0.npy"
    np.save(label, np.full(SIZE, -100.0))
    assert set(Arrays(damaged / "train", KINDS, SIZE, CLASSES)[0][1][0].unique().tolist()) == {-1}


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: shutil.rmtree(d), "no folder .*data"),
        (lambda d: shutil.rmtree(d / "val"), "no folder .*val.image"),
        (lambda d: shutil.rmtree(d / "val" / "normal"), "no folder .*val.normal"),
        (lambda d: (d / "train" / "depth" / "1.npy").unlink(), "depth.1.npy is missing"),
        (lambda d: (d / "train" / "depth" / "2.npy").unlink(), "train: the numbers of files differ.* 2 of depth"),
        (lambda d: [p.unlink() for p in (d / "val" / "image").iterdir()], "val.image has no .npy files"),
        (lambda d: cut(d / "train" / "image" / "1.npy"), "image.1.npy is damaged or cut off"),
        (lambda d: (d / "val" / "label" / "0.npy").write_bytes(b""), "label.0.npy is damaged or cut off"),
        (lambda d: (d / "val" / "label" / "0.npy").write_bytes(b"no array at all"), "label.0.npy is damaged"),
        (
            lambda d: np.save(d / "train" / "label" / "0.npy", np.full(SIZE, 13)),
            "label.0.npy has the label 13",
        ),
        (lambda d: np.save(d / "train" / "label" / "0.npy", np.full(SIZE, np.nan)), "label.0.npy has the label nan"),
        (lambda d: np.save(d / "train" / "image" / "0.npy", np.zeros((3, *SIZE))), r"image.0.npy .* \(3, 32, 64\)"),
        (lambda d: np.save(d / "val" / "depth" / "1.npy", np.zeros(SIZE)), "depth.1.npy .* where"),
        (lambda d: np.save(d / "val" / "depth" / "1.npy", np.array(["x"])), "depth.1.npy holds"),
    ],
)
def test_damaged_arrays_are_told(damaged, damage, said):
    damage(damaged)
    with pytest.raises(BenchError, match=said):
        nyuv2.make(arguments(nyuv2), damaged)


def arguments(example, **changes):
    known = {"data_set": "nyuv2", "model": "segnet", "protocol": None, "augment": None, "weights": None}
    if example is not nyuv2:
        known = {"data_set": "office-31", "lists": None, "weights": None}
    return Namespace(**{"smoke": True, "check": True, **known, **changes})


def test_cityscapes_labels_may_be_in_label_7(tmp_path):
    samples.write_arrays(tmp_path / "x", {"train": 2, "val": 1}, ["image", "label_7", "depth"], SIZE, 7)
    work = nyuv2.make(arguments(nyuv2, data_set="cityscapes"), tmp_path / "x")
    assert [task.name for task in work.tasks] == ["segmentation", "depth"]
    assert len(work.data["train"][0][0][1]) == 2


def test_another_number_of_samples_than_the_protocols_is_warned_of(scenes, monkeypatch, capsys):
    monkeypatch.setitem(nyuv2.SIZES, "nyuv2", SIZE)
    nyuv2.make(arguments(nyuv2), scenes)
    assert "warning" not in capsys.readouterr().err
    nyuv2.make(arguments(nyuv2, smoke=False), scenes)
    told = capsys.readouterr().err
    assert "warning: NYUv2, train has 3 samples, the protocol 795" in told
    assert "warning: NYUv2, val has 2 samples, the protocol 654" in told


def test_augmentation_moves_all_channels_alike():
    """A picture of its own coordinates: label, depth and normal say where their pixel came from."""
    height, width = 32, 64
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    normal = torch.stack([torch.full_like(x, 0.6), torch.zeros_like(x), torch.full_like(x, 0.8)])
    seen = set()
    torch.manual_seed(0)
    for _ in range(30):
        image, label, depth, turned = augmented([torch.stack([x, y, x]), x[None], 1 + x[None], normal])
        assert image.shape == (3, height, width)
        assert label.shape == depth.shape == (1, height, width)
        assert (image[0] - label[0]).abs().max() < 2 / width  # within a pixel
        steps = image[0, 0].diff()
        flipped = bool(steps.mean() < 0)
        scale = 1 / (steps.abs().mean() * width * (width - 1) / (width - 1)).item()
        (near,) = [s for s in (1.0, 1.2, 1.5) if abs(s - scale) < 0.05]
        assert torch.allclose((1 + label) / near, depth)  # what is nearer is less deep
        assert torch.allclose(turned[0], torch.full_like(x, -0.6 if flipped else 0.6))
        assert torch.allclose(turned[2], normal[2])
        seen.add((near, flipped))
    assert len(seen) == 6


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    pytest.importorskip("PIL")
    root = tmp_path_factory.mktemp("faces") / "data"
    celeba.write_sample(arguments(celeba), root)
    return root


def test_pictures_are_scaled_to_their_size_and_normalized(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, 10:] = (255, 51, 0)
    image.fromarray(pixels).save(tmp_path / "a.png")
    data = Pictures([tmp_path / "a.png"], torch.tensor([3]), (5, 8), (0.5, 0.0, 0.0), (0.5, 0.1, 1.0))
    found, label = data[0]
    assert found.shape == (3, 5, 8)
    assert label == 3
    assert torch.allclose(found[:, :, 0], torch.tensor([-1.0, 0.0, 0.0])[:, None].expand(3, 5))
    assert torch.allclose(found[:, :, -1], torch.tensor([1.0, 2.0, 0.0])[:, None].expand(3, 5))


def test_celeba_is_split_and_labelled_by_its_files(faces):
    work = celeba.Faces(arguments(celeba), faces)
    assert [len(work.data[split][0]) for split in ("train", "val", "test")] == [5, 4, 4]
    lines = (faces / "Anno" / "list_attr_celeba.txt").read_text().splitlines()
    first_of_test = lines[2 + 5 + 4].split()
    _, labels = work.data["test"][0][0]
    assert labels.tolist() == [float(x == "1") for x in first_of_test[1:]]
    assert work.data["test"][0].paths[0].name == first_of_test[0]
    assert [task.name for task in work.tasks] == lines[1].split()


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


ANNO, EVAL, IMG = "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt", "Img/img_align_celeba"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: shutil.rmtree(d), "no folder .*data"),
        (lambda d: (d / ANNO).unlink(), "no file .*list_attr_celeba"),
        (lambda d: (d / EVAL).unlink(), "no file .*list_eval_partition"),
        (lambda d: shutil.rmtree(d / IMG), "no folder .*img_align_celeba"),
        (lambda d: (d / ANNO).write_text(""), "list_attr_celeba.txt is empty"),
        (lambda d: (d / ANNO).write_bytes(b"\xff\xfe\x00"), "list_attr_celeba.txt is not a text file"),
        (lambda d: replaced(d / ANNO, "Attribute_7 ", ""), "got 39 names"),
        (lambda d: replaced(d / ANNO, " -1", " 0"), "line 3: 40 values of -1 or 1"),
        (lambda d: replaced(d / ANNO, "13\n", "14\n"), "says it has 14 pictures and has 13: cut off?"),
        (lambda d: replaced(d / EVAL, "000003.jpg 0\n", ""), "12 pictures, and 13 are labelled"),
        (lambda d: replaced(d / EVAL, "000003.jpg 0", "000003.jpg 3"), "line 3: .*got '000003.jpg 3'"),
        (lambda d: replaced(d / EVAL, "000003.jpg 0", "x.jpg 0"), "line 3: .*got 'x.jpg 0'"),
        (lambda d: (d / EVAL).write_text((d / EVAL).read_text().replace(" 1\n", " 0\n")), "no pictures for val"),
        (lambda d: (d / IMG / "000002.jpg").unlink(), "no file .*000002.jpg"),
        (lambda d: cut(d / IMG / "000002.jpg"), "000002.jpg is damaged or cut off"),
        (lambda d: (d / IMG / "000002.jpg").write_text("no picture"), "000002.jpg is damaged or cut off"),
    ],
)
def test_damaged_celeba_is_told(faces, tmp_path, damage, said):
    root = shutil.copytree(faces, tmp_path / "data")
    damage(root)
    with pytest.raises(BenchError, match=said):
        celeba.Faces(arguments(celeba), root)


def test_a_picture_that_was_not_checked_is_told_when_it_is_read(faces, tmp_path):
    root = shutil.copytree(faces, tmp_path / "data")
    cut(root / IMG / "000001.jpg")
    work = celeba.Faces(arguments(celeba, check=False), root)
    with pytest.raises(BenchError, match="cannot be read"):
        work.data["train"][0][0]


@pytest.fixture
def no_torchvision(monkeypatch):
    """The lists are read without a network."""
    monkeypatch.setattr(office.Domains, "network", lambda self: None)


@pytest.mark.parametrize("data_set", ["office-31", "office-home"])
def test_office_has_lists_for_each_domain(data_set, tmp_path, no_torchvision):
    pytest.importorskip("PIL")
    args = arguments(office, data_set=data_set)
    office.write_sample(args, tmp_path / "x")
    work = office.make(args, tmp_path / "x")
    assert [task.name for task in work.tasks] == list(office.SPLITS[data_set])
    for part, count in (("train", 5), ("val", 3), ("test", 3)):
        assert [len(data) for data in work.data[part]] == [count] * len(work.tasks)
    lines = (tmp_path / "x" / "data_txt" / data_set / f"{work.tasks[1].name}_val.txt").read_text().splitlines()
    image, label = work.data["val"][1][2]
    assert image.shape == (3, *office.SMOKE_SIZE)
    assert label == int(lines[2].split()[-1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: shutil.rmtree(d / "data_txt" / "office-31"), "no folder .*office-31"),
        (lambda d: (d / "data_txt/office-31/dslr_val.txt").unlink(), "no file .*dslr_val.txt"),
        (lambda d: (d / "data_txt/office-31/dslr_val.txt").write_text("a/b.jpg 31\n"), "line 1: .* below 31"),
        (lambda d: (d / "data_txt/office-31/dslr_val.txt").write_text("a/b.jpg\n"), "line 1: .*got 'a/b.jpg'"),
        (lambda d: (d / "data_txt/office-31/dslr_val.txt").write_text("a/b.jpg 3\n"), "no file .*a/b.jpg"),
    ],
)
def test_damaged_office_is_told(tmp_path, damage, said, no_torchvision):
    pytest.importorskip("PIL")
    office.write_sample(arguments(office), tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(BenchError, match=said):
        office.make(arguments(office), tmp_path / "x")
