"""Reading training images: pack, folder, IDX; splits; refused inputs."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from sagan_kernels.data import load_images


def write_pack(path, count=40, side=32, channels=3, **extra):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 4, **extra)
    return images


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(
        gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes()
    )


def write_image(path, color, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_pack_splits_cover_every_image_once(tmp_path):
    images = write_pack(tmp_path / "pack.npz", class_names=["a", "b", "c", "d"])
    train = load_images(tmp_path / "pack.npz", resolution=32)
    test = load_images(tmp_path / "pack.npz", resolution=32, split="test")
    assert (len(train), len(test)) == (36, 4)
    assert train.class_names == ["a", "b", "c", "d"]
    assert test.labels.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(test.images, images[36:])
    together = {image.tobytes() for image in np.concatenate([train.images, test.images])}
    assert together == {image.tobytes() for image in images}


def test_batch_maps_bytes_to_minus_one_to_one(tmp_path):
    write_pack(tmp_path / "pack.npz")
    data = load_images(tmp_path / "pack.npz", resolution=32)
    x, label = data.batch(np.array([3, 0]))
    assert x.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(
        x[0].permute(1, 2, 0).numpy(), data.images[3].astype(np.float64) / 127.5 - 1, atol=1e-6
    )
    assert label.tolist() == [int(data.labels[3]), int(data.labels[0])]


def test_folder_names_are_classes_and_images_are_cropped_to_the_center(tmp_path):
    for i in range(10):
        write_image(tmp_path / "red" / f"{i}.png", (255, 0, 0))
        write_image(tmp_path / "blue" / "deep" / f"{i}.jpg", (0, 0, 255))
    striped = np.zeros((32, 64, 3), np.uint8)
    striped[:, 16:48] = 200  # the center half is gray, the margins are black
    Image.fromarray(striped).save(tmp_path / "red" / "0.png")
    data = load_images(tmp_path, resolution=32)
    assert data.class_names == ["blue", "red"]
    assert sorted(np.bincount(data.labels)) == [9, 9]
    assert (data.images[data.labels == 1][0] == 200).all()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_images_are_padded_to_32(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for stem, count in [("train", 12), ("t10k", 5)]:
        write_idx(
            tmp_path / f"{stem}-images-idx3-ubyte{suffix}", rng.integers(1, 256, (count, 28, 28), np.uint8)
        )
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)
    train = load_images(tmp_path, resolution=32, channels=1)
    assert train.images.shape == (12, 32, 32, 1)
    assert (train.images[:, 2:30, 2:30] > 0).all()
    assert train.images.sum() == train.images[:, 2:30, 2:30].sum()
    assert len(load_images(tmp_path, resolution=32, channels=1, split="test")) == 5
    assert train.class_names[9] == "ankle boot"


def test_broken_image_is_named_and_refused(tmp_path):
    for i in range(12):
        write_image(tmp_path / "a" / f"{i}.png", (9, 9, 9))
    whole = (tmp_path / "a" / "3.png").read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"3\.png: must be an image"):
        load_images(tmp_path, resolution=32)
    assert len(load_images(tmp_path, resolution=32, broken="skip")) == 10


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere must be a folder or an \.npz file"):
        load_images(tmp_path / "nowhere", resolution=32)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images .* got none"):
        load_images(tmp_path, resolution=32)


@pytest.mark.parametrize(
    ("resolution", "channels", "message"),
    [(64, 3, r"images must be uint8 \(N, 64, 64, 3\), got uint8 \(40, 32, 32, 3\)"), (32, 1, r"32, 32, 1\)")],
)
def test_pack_of_another_size_is_refused(tmp_path, resolution, channels, message):
    write_pack(tmp_path / "pack.npz")
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "pack.npz", resolution=resolution, channels=channels)


def test_truncated_pack_is_refused(tmp_path):
    write_pack(tmp_path / "pack.npz")
    whole = (tmp_path / "pack.npz").read_bytes()
    (tmp_path / "pack.npz").write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match=r"pack\.npz: must be an \.npz pack"):
        load_images(tmp_path / "pack.npz", resolution=32)


def test_pack_without_labels_is_refused(tmp_path):
    np.savez(tmp_path / "pack.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="got no 'labels'"):
        load_images(tmp_path / "pack.npz", resolution=32)


def test_label_beyond_the_class_names_is_refused(tmp_path):
    write_pack(tmp_path / "pack.npz", class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="labels must be below 3 classes, got 3"):
        load_images(tmp_path / "pack.npz", resolution=32)


def test_pickled_pack_is_refused(tmp_path):
    np.savez(tmp_path / "pack.npz", images=np.array([{}], dtype=object), labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"must be an \.npz pack"):
        load_images(tmp_path / "pack.npz", resolution=32)


def test_cut_idx_file_is_refused(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8))
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="must be a whole IDX file"):
        load_images(tmp_path, resolution=32, channels=1)


def test_interleaved_labels_keep_every_class_in_both_splits(tmp_path):
    images = np.zeros((100, 32, 32, 1), np.uint8)
    np.savez(tmp_path / "pack.npz", images=images, labels=np.arange(100) % 10)
    for split, count in [("train", 9), ("test", 1)]:
        data = load_images(tmp_path / "pack.npz", resolution=32, channels=1, split=split)
        assert np.bincount(data.labels).tolist() == [count] * 10


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.array(["a"] * 20)}, "labels must be one whole number for each of 20 images, got <U1"),
        ({"labels": np.full(20, np.nan)}, "labels must be one whole number"),
        ({"labels": np.arange(20) - 1}, "labels must be at least 0, got -1"),
        ({"class_names": ["a", "a"]}, "class_names must differ, got a, a"),
    ],
)
def test_wrong_labels_are_refused_in_one_line(tmp_path, arrays, message):
    pack = {"images": np.zeros((20, 32, 32, 1), np.uint8), "labels": np.arange(20) % 2}
    np.savez(tmp_path / "pack.npz", **pack | arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path / "pack.npz", resolution=32, channels=1)
    assert "\n" not in str(caught.value)


def test_bare_array_and_damaged_archives_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("x.npy", "text.npz"):
        with pytest.raises(
            ValueError, match=r"must be an \.npz pack of plain arrays, got a file that is not$"
        ):
            load_images(tmp_path / name, resolution=32)


def test_idx_label_count_must_be_the_image_count(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="one whole number for each of 4 images"):
        load_images(tmp_path, resolution=32, channels=1)


def test_deep_transparent_and_turned_images_are_read_as_they_look(tmp_path):
    for i in range(10):
        write_image(tmp_path / "a" / f"{i}.png", (0, 0, 0), size=(32, 32))
    Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(tmp_path / "a" / "0.png")
    Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(tmp_path / "a" / "1.png")
    turned = Image.new("RGB", (32, 32))
    turned.paste((255, 255, 255), (0, 0, 32, 16))  # the top half is white as stored
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "a" / "2.png", exif=exif)
    images = load_images(tmp_path, resolution=32).images
    assert (images[0] == 128).all()
    assert (images[1] == 255).all()
    assert (images[2, :16] == 0).all()
    assert (images[2, 16:] == 255).all()


def test_skipped_files_are_named(tmp_path, capsys):
    for i in range(12):
        write_image(tmp_path / "a" / f"{i}.png", (9, 9, 9))
    (tmp_path / "a" / "3.png").write_bytes(b"broken")
    load_images(tmp_path, resolution=32, broken="skip")
    assert capsys.readouterr().err == "data: skipped 1 broken of 12 images: a/3.png\n"
