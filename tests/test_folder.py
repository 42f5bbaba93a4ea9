"""Images of one's own: folders and CSV files."""

from __future__ import annotations

import os

import pytest

from deen_zoo.data import Sample
from deen_zoo.data.folder import UNKNOWN, list_images, open_folder, read_csv
from deen_zoo.errors import UserError

from .trees import write


def test_images_at_any_depth_sorted_and_the_other_files(tmp_path):
    for name in ("b/10.jpg", "b/9.jpg", "a.bmp", ".hidden/x.jpg", "b/._9.jpg"):
        write(tmp_path / name, "visible")
    (tmp_path / "b" / "notes.txt").write_text("x")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    images, others = list_images(tmp_path)
    assert [os.path.relpath(p, tmp_path) for p in images] == ["a.bmp", "b/10.jpg", "b/9.jpg"]
    assert [os.path.relpath(p, tmp_path) for p in others] == ["b/notes.txt"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "absent")


def test_csv(tmp_path):
    file = tmp_path / "images.csv"
    file.write_text(
        "\ufeffcamera, path ,identity,modality,note\n"
        "3,a/1.jpg,0007,infrared,x\n,/b.jpg,,visible,\n",
        encoding="utf-8",
    )
    assert read_csv(file) == [
        Sample(str(tmp_path / "a/1.jpg"), 7, 3, "infrared"),
        Sample("/b.jpg", UNKNOWN, UNKNOWN, "visible"),
    ]
    file.write_text("path\nx.jpg\n")
    assert read_csv(file, "infrared")[0].modality == "infrared"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the first line is ''; write path,identity,camera,modality"),
        ("file,identity\nx.jpg,1\n", "the first line is 'file,identity'"),
        ("path,modality\n", "no rows"),
        ("path,modality\nx.jpg,nir\n", "line 2: modality 'nir'; write 'visible' or 'infrared'"),
        ("path,modality\nx.jpg,auto\n", "line 2: modality 'auto'"),
        ("path\nx.jpg\n", "line 2: modality ''"),
        ("path,modality\n,visible\n", "line 2: no path"),
        ("path,modality,identity\nx.jpg,visible,alice\n", "line 2: identity 'alice'"),
        ("path,modality,camera\nx.jpg,visible,-1\n", "line 2: camera '-1'"),
        ("path,modality\nx.jpg\n", "line 2: not 2 cells"),
        ("path,modality\nx.jpg,visible,3\n", "line 2: not 2 cells"),
    ],
)
def test_csv_faults_are_named_by_line(text, message, tmp_path):
    file = tmp_path / "images.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_csv(file)
    assert str(file) in str(caught.value)


def test_csv_that_is_none(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes(b"path,modality\n\xe9.jpg,visible\n")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        read_csv(tmp_path / "latin.csv")


def test_two_folders(tmp_path):
    write(tmp_path / "visible/0007/a.jpg", "visible")
    write(tmp_path / "visible/12/cam3/b.jpg", "visible")
    write(tmp_path / "infrared/7/x.bmp", "infrared")
    assert [(os.path.relpath(s.path, tmp_path), *s[1:]) for s in open_folder(tmp_path)] == [
        ("visible/0007/a.jpg", 7, 1, "visible"),
        ("visible/12/cam3/b.jpg", 12, 3, "visible"),
        ("infrared/7/x.bmp", 7, 2, "infrared"),
    ]


@pytest.mark.parametrize(
    "names, message",
    [
        (["visible/1/a.jpg"], "no folder infrared in it"),
        (["a.jpg"], "no folder visible and infrared in it"),
        (["visible/1/a.jpg", "infrared/alice/a.jpg"], "infrared/alice/a.jpg: not infrared/IDENT"),
        (["visible/a.jpg", "infrared/1/a.jpg"], "visible/a.jpg: not visible/IDENTITY"),
        (["visible/1/a/b/c.jpg", "infrared/1/a.jpg"], "not visible/IDENTITY"),
        (["visible/1/a.jpg", "infrared/1/a.txt"], "no infrared image"),
    ],
)
def test_other_layouts_are_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)
