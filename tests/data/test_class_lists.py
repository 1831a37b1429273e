"""Lists of classes as tools write them: each form gives the same classes, and no form shifts them by one."""

import json

import pytest
import yaml

from convmae.data.class_lists import read_class_list
from convmae.errors import UserError

NAMES = ["background", "traffic light", "dog"]
COLOURS = [(0, 0, 0), (128, 64, 0), (10, 20, 30)]

# What is in the file, by its name; all of them mean the three classes.
PLAIN = {
    "plain.txt": "background\ntraffic light\ndog\n",
    "windows.txt": "\ufeffbackground\r\ntraffic light \r\ndog\r\n\r\n",
    "comments.txt": "# my classes\nbackground\n# the others\ntraffic light\ndog\n",
    "numbered.txt": "0 background\n1 traffic light\n2 dog\n",
    "colons.txt": "0: background\n1: traffic light\n2: dog\n",
    "commas.txt": "0,background\n1,traffic light\n2,dog\n",
    "tabs.txt": "0\tbackground\n1\ttraffic light\n2\tdog\n",
    "behind.txt": "background: 0\ntraffic light: 1\ndog: 2\n",
    "disordered.txt": "2 dog\n0 background\n1 traffic light\n",
    "headed.txt": "id name\n0 background\n1 traffic light\n2 dog\n",
    "headed.csv": "name\nbackground\ntraffic light\ndog\n",
    "quoted.csv": '"id","name"\n0,"background"\n1,"traffic light"\n2,"dog"\n',
    "semicolons.csv": "ID;Name\n1;traffic light\n0;background\n2;dog\n",
    "roboflow.csv": "Pixel Value, Class\n0, background\n1, traffic light\n2, dog\n",
    "labelled.csv": "label,name\n0,background\n1,traffic light\n2,dog\n",
    "commented.csv": "# exported\nname,id\nbackground,0\ntraffic light,1\ndog,2\n",
    "bare.csv": "0,background\n1,traffic light\n2,dog\n",
    "others.csv": "Idx,Ratio,Stuff,Name\n0,0.1,1,background\n1,0.2,0,traffic light\n2,0.3,0,dog\n",
    "list.json": json.dumps(NAMES),
    "mapping.json": json.dumps({"1": "traffic light", "0": "background", "2": "dog"}),
    "back.json": json.dumps({"traffic light": 1, "background": 0, "dog": 2}),
    "coco.json": json.dumps({"categories": [{"id": n, "name": NAMES[n], "supercategory": "x"} for n in (1, 0, 2)]}),
    "objects.txt": json.dumps([{"name": name} for name in NAMES]),
    "list.yaml": "- background\n- traffic light\n- dog\n",
    "list.txt": "- background\n- traffic light\n- dog\n",
    "mapping.yml": "0: background\n1: traffic light\n2: dog\n",
    "data.yaml": "train: ../train\nval: ../val\nnc: 3\nnames: ['background', 'traffic light', 'dog']\n",
    "ultralytics.yaml": "path: x\nnames:\n  0: background\n  1: traffic light\n  2: dog\n",
    "keyed.txt": "names:\n- background\n- traffic light\n- dog\n",
}

COLOURED = {
    "camvid.csv": "name,r,g,b\nbackground,0,0,0\ntraffic light,128,64,0\ndog,10,20,30\n",
    "camvid.txt": "0 0 0\tbackground\n128 64 0\ttraffic light\n10 20 30\tdog\n",
    "behind.txt": "background 0 0 0\ntraffic light 128 64 0\ndog 10 20 30\n",
    "both.txt": "0 background 0 0 0\n1 traffic light 128 64 0\n2 dog 10 20 30\n",
    "between.txt": "0 0 0 0 background\n1 128 64 0 traffic light\n2 10 20 30 dog\n",
    "table.txt": "name,r,g,b\nbackground,0,0,0\ntraffic light,128,64,0\ndog,10,20,30\n",
    "hash.csv": "#name,red,green,blue\nbackground,0,0,0\ntraffic light,128,64,0\ndog,10,20,30\n",
    "bare.csv": "background,0,0,0\ntraffic light,128,64,0\ndog,10,20,30\n",
    "numbered.csv": "2,dog,10,20,30\n0,background,0,0,0\n1,traffic light,128,64,0\n",
    "hex.csv": "id,name,color\n0,background,#000000\n1,traffic light,#804000\n2,dog,#0A141E\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    "background:0,0,0::\ntraffic light:128,64,0::\ndog:10,20,30:a,b:run\n",
    "cvat.json": json.dumps(
        [
            {"name": "background", "color": "#000000", "attributes": []},
            {"name": "traffic light", "color": "#804000", "attributes": []},
            {"name": "dog", "color": "#0a141e", "attributes": []},
        ]
    ),
    "colours.json": json.dumps(dict(zip(NAMES, COLOURS, strict=True))),
    "labels.yaml": yaml.safe_dump(
        {"labels": [{"name": name, "color": list(colour)} for name, colour in zip(NAMES, COLOURS, strict=True)]}
    ),
}


def written(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("name", PLAIN)
def test_names_are_the_same_in_every_form(name, tmp_path):
    listed = read_class_list(written(tmp_path, name, PLAIN[name]))
    assert listed.names == NAMES
    assert (listed.numbers, listed.colours, list(listed.findings)) == (None, None, [])


@pytest.mark.parametrize("name", COLOURED)
def test_colours_are_the_same_in_every_form(name, tmp_path):
    listed = read_class_list(written(tmp_path, name, COLOURED[name]))
    assert listed.names == NAMES
    assert listed.colours == COLOURS
    assert listed.numbers is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("numbered.txt", "8 dog\n7 cat\n11 owl\n"),
        ("numbers.csv", "name,id\ndog,8\nowl,11\ncat,7\n"),
        ("mapping.json", json.dumps({"11": "owl", "7": "cat", "8": "dog"})),
    ],
)
def test_other_numbers_are_kept_and_order_the_names(name, content, tmp_path):
    listed = read_class_list(written(tmp_path, name, content))
    assert (listed.names, listed.numbers) == (["cat", "dog", "owl"], [7, 8, 11])


def test_words_stay_words(tmp_path):
    """YAML has a no of its own, JSON knows numbers; names with commas, digits and brackets are names."""
    assert read_class_list(written(tmp_path, "a.yaml", "[no, on, 3]")).names == ["no", "on", "3"]
    assert read_class_list(written(tmp_path, "b.txt", "[b]owl\nred, green\n3 wheeler\ncar\n")).names == [
        *("[b]owl", "red, green", "3 wheeler", "car")
    ]
    assert read_class_list(written(tmp_path, "c.txt", "2 door\n4 door\n")).names == ["2 door", "4 door"]
    assert read_class_list(written(tmp_path, "f.txt", "red\ngreen\nid\n")).names == ["red", "green", "id"]
    assert read_class_list(written(tmp_path, "d.txt", "0\n1\n2\n")).names == ["0", "1", "2"]
    assert read_class_list(written(tmp_path, "e.txt", "label map\nclass 1\nclass 2\n")).names[0] == "label map"


def test_labelmes_first_line_is_no_class_and_that_is_said(tmp_path):
    path = written(tmp_path, "labels.txt", "__ignore__\n_background_\ncat\n")
    listed = read_class_list(path)
    assert listed.names == ["_background_", "cat"]
    (finding,) = listed.findings
    assert finding.summary == f"{path}, line 1, __ignore__ is no class: the next one has the label 0"


def test_a_label_without_colour_leaves_the_list_without_colours(tmp_path):
    listed = read_class_list(written(tmp_path, "labelmap.txt", "background:0,0,0::\ndog:::\n"))
    assert (listed.names, listed.colours) == (["background", "dog"], None)


REFUSED = {
    "a heading": ("a.txt", "name\nsky\ntree\n", ", line 1, 'name' looks like a heading: remove it"),
    "several headings": ("a.txt", "class\nsky\ntree\n", ", line 1, 'class' looks like a heading"),
    "some numbers": ("a.txt", "0 sky\n1 tree\nroad\n", ", line 3, 'road' has no number, and others have: number all"),
    "a number twice": ("a.txt", "0 sky\n1 tree\n1 road\n", " gives the number 1 to both tree and road: correct one"),
    "a name twice": ("a.txt", "0 sky\n1 sky\n", ", line 2, names the class sky again: give each class a name"),
    "large numbers": ("a.txt", "0 sky\n256 tree\n", ", line 2, has the number 256, but label maps have 8 bits"),
    "negative": ("a.json", '{"-1": "no", "0": "sky"}', ", entry -1, has the number -1, but label maps have 8 bits"),
    "an empty line": (
        "a.txt",
        "# x\nsky\n\ntree\n",
        ", line 3, names no class: remove it, or name the class of",
    ),
    "trainId": (
        "a.csv",
        "name,id,trainId\nsky,1,0\n",
        ", line 1, has several columns of numbers: id, trainId",
    ),
    "two names": ("a.csv", "class,label\nsky,x\ntree,y\n", ", line 1, has several columns of names: class, label"),
    "unknown headings": (
        "a.csv",
        "Klasse,Nummer\nHund,0\nBär,1\n",
        ", line 1, has columns of unknown names: call",
    ),
    "no name": ("a.csv", "0,1\n1,2\n", " has 2 columns without a heading: begin with a line that calls them name, id"),
    "two columns": ("a.csv", "sky,blue\ntree,green\n", " has 2 columns without a heading"),
    "ragged": ("a.csv", "name,id\nsky,0\ntree\n", ", line 3, has 1 columns, the first 2: correct it"),
    "no number": ("a.csv", "name,id\nsky,0\ntree,x\n", ", line 3, has the number 'x': give a whole one"),
    "no colour": ("a.csv", "name,r,g,b\nsky,0,0,0\ntree,0,256,0\n", ", line 3, has the colour '0 256 0': give three"),
    "one colour": ("a.csv", "name,r,g,b\nsky,0,0,0\ntree,0,0,0\n", " gives the colour (0, 0, 0) to several classes"),
    "no JSON": ("a.json", '["sky", ', " is no JSON, check it: "),
    "no YAML": ("a.yaml", "names: [sky", " is no YAML, check it: "),
    "nc": ("a.yaml", "nc: 3\nnames: [sky, tree]\n", " names 2 classes, but says nc: 3: correct one of them"),
    "nothing": ("a.yaml", "train: x\n", ", entry train, 'train' has neither a number nor a colour: give a list"),
    "no list": ("a.json", "3", " lists no classes: give a list of names, or a mapping from label to name"),
    "two lists": ("a.json", '{"names": ["a", "b"], "classes": ["a", "b"]}', " has several lists, names and classes"),
    "nested": ("a.json", '[["sky"], ["tree"]]', ", entry 0, names no class: give a list of names"),
    "one class": ("a.txt", "background\n", " names 1 classes: it must be 2 to 255, one a line"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_clear_is_refused_in_one_line(kind, tmp_path):
    name, content, message = REFUSED[kind]
    path = written(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_class_list(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)
