import math

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from convmae import visualize
from convmae.visualize import (
    DrawnPicture,
    SegmentedPicture,
    class_colours,
    confusion_picture,
    detection_picture,
    encoder_picture,
    loss_curve,
    neighbours_picture,
    reconstruction_picture,
    segmentation_picture,
)

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's tab:blue and tab:orange


def places(path, colour):
    """Rows and columns of the pixels of a colour, but for rounding."""
    picture = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return np.nonzero((np.abs(picture - colour) <= 1).all(axis=-1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_a_picture_shows_the_three_columns(tmp_path, channels):
    original, reconstruction = torch.full((channels, 32, 64), 1.0), torch.full((channels, 32, 64), 0.0)
    visible = torch.zeros(2, 4, dtype=torch.bool)
    visible[0, 0] = True
    path = tmp_path / "new" / "picture.png"
    reconstruction_picture(path, [original], [visible], [reconstruction])
    picture = Image.open(path).convert("L")
    width, height = picture.size
    middle = [picture.getpixel((int(width * x), int(height * 0.7))) for x in (1 / 6, 3 / 6, 5 / 6)]
    assert middle[0] == 255  # original: white
    assert 126 <= middle[1] <= 129  # masked places: grey
    assert middle[2] == 0  # reconstruction: black


def test_rows_may_differ_in_size(tmp_path):
    sizes = [(16, 32), (48, 16)]
    images = [torch.rand(3, *size) for size in sizes]
    visible = [torch.rand(size[0] // 16, size[1] // 16) < 0.5 for size in sizes]
    reconstruction_picture(tmp_path / "p.png", images, visible, images)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("steps", [(1, 2, 3), (8,)])
def test_a_loss_curve_is_drawn(tmp_path, steps):
    loss_curve(tmp_path / "loss.png", [{"step": step, "loss": 1 / step, "lr": 0.1} for step in steps])
    width = Image.open(tmp_path / "loss.png").width
    _, columns = places(tmp_path / "loss.png", BLUE)
    assert ((columns > 0.1 * width) & (columns < 0.9 * width)).any()  # the loss, beside its axis


def test_below_the_loss_stands_the_accuracy_where_there_is_one(tmp_path):
    losses = [{"step": step, "loss": 1.0, "lr": 0.1} for step in range(1, 9)]
    evaluations = {4: {"top1": 0.1, "top5": 0.5}, 8: {"top1": 0.9, "top5": 0.95}}
    merged = [record | evaluations.get(record["step"], {}) for record in losses]
    alone = [*losses[:3], {"step": 4, "epoch": 0, "top1": 0.1, "top5": 0.5}, *merged[4:]]  # steps between log lines
    loss_curve(tmp_path / "plain.png", losses)
    for metrics in (merged, alone):
        loss_curve(tmp_path / "both.png", metrics)
        plain, both = (Image.open(tmp_path / name) for name in ("plain.png", "both.png"))
        assert both.width == plain.width
        assert both.height > 1.5 * plain.height
        for colour in (BLUE, ORANGE):  # top-1 and top-5; both rise from step 4 to step 8
            rows, columns = places(tmp_path / "both.png", colour)
            rows, columns = rows[rows > both.height / 2], columns[rows > both.height / 2]
            inside = (columns > 0.3 * both.width) & (rows < 0.9 * both.height)
            rows, columns = rows[inside], columns[inside]
            middle = (columns.min() + columns.max()) / 2
            assert rows[columns < middle].mean() > rows[columns > middle].mean() + 10


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path):
    loss_curve(tmp_path / "l.png", [{"step": s, "loss": math.nan if s == 2 else s, "lr": 0.1} for s in (1, 2, 3, 4)])
    assert len(places(tmp_path / "l.png", BLUE)[0]) > 50


@pytest.mark.parametrize("count", [3, 20, 50])
def test_a_confusion_matrix_shows_shares_of_each_true_class(tmp_path, count):
    """Cells of the first three classes: mostly right, always taken for the third, without images."""
    confusion = torch.eye(count, dtype=torch.int64)
    confusion[:3, :3] = torch.tensor([[30, 10, 0], [0, 0, 7], [0, 0, 0]])
    confusion_picture(tmp_path / "c.png", confusion, [f"class {number}" for number in range(count)])
    blues = matplotlib.colormaps["Blues"]

    def middle(share):
        rows, columns = places(tmp_path / "c.png", np.array(blues(share, bytes=True)[:3], dtype=int))
        in_matrix = columns < 0.86 * Image.open(tmp_path / "c.png").width  # on its right stands the scale
        return np.median(rows[in_matrix]), np.median(columns[in_matrix])

    mostly, seldom = middle(0.75), middle(0.25)
    assert mostly[0] == pytest.approx(seldom[0], abs=4)  # one row: the same true class
    assert mostly[1] < seldom[1]
    if count == 3:
        always, never = middle(1.0), middle(0.0)
        assert always[0] > mostly[0]
        assert always[1] > seldom[1]
        assert always[1] - seldom[1] == pytest.approx(seldom[1] - mostly[1], abs=10)
        assert never[0] > mostly[0]  # five of the six white cells are below, the empty class among them


def test_names_of_classes_are_no_formulas(tmp_path):
    confusion_picture(tmp_path / "c.png", torch.eye(2, dtype=torch.int64), ["a$^$", r"$\frac$"])
    assert Image.open(tmp_path / "c.png").format == "PNG"


def test_neighbours_are_drawn_in_rows_of_any_length(tmp_path):
    red, blue = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    red[0], blue[2] = 1, 1
    neighbours_picture(tmp_path / "n.png", [[(red, "a $x name that is long"), (blue, "0.900")], [(red, "b")]])
    picture = Image.open(tmp_path / "n.png").convert("RGB")
    width, height = picture.size
    colours = [
        picture.getpixel((int(width * x), int(height * y)))
        for x, y in ((0.25, 0.3), (0.75, 0.3), (0.25, 0.8), (0.75, 0.8))
    ]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("channels", [1, 3])
def test_components_become_colours_in_spite_of_outliers(tmp_path, channels):
    components = torch.zeros(2, 20, 20, 3)
    components[:, :, 10:] = 1.0
    components[0, 0, 0] = 1000.0
    attention = torch.full((2, 20, 20), 1 / 400)
    encoder_picture(tmp_path / "e.png", [torch.ones(channels, 40, 40)] * 2, components, attention, (10, 10))
    picture = Image.open(tmp_path / "e.png").convert("RGB")
    width, height = picture.size
    for y in (0.3, 0.8):  # both rows: left half dark, right half bright
        left, right = (picture.getpixel((int(width * x), int(height * y))) for x in (0.4, 0.6))
        assert max(left) < 20
        assert min(right) > 235


def test_detections_are_drawn_over_their_pictures(tmp_path):
    """A red and a blue object on white: inside the masks white is tinted, elsewhere it stays."""
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 20:50, 10:30], masks[1, 20:50, 50:70] = True, True
    objects = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 50.0], [50.0, 20.0, 70.0, 50.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": masks,
    }
    nothing = {name: value[:0] for name, value in objects.items()}
    white = torch.ones(3, 60, 80)
    detection_picture(
        tmp_path / "p.png", [[DrawnPicture(white, objects, "some"), DrawnPicture(white, nothing, "none")]], ["$a", "b"]
    )
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"), dtype=int)
    tinted = pixels.max(axis=2) > pixels.min(axis=2)
    half = pixels.shape[1] // 2
    assert not tinted[:, half:].any()
    share = tinted[:, :half].mean()
    assert 0.15 < share < 0.4  # the masks are a quarter of the picture


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, save = [], visualize._save
    monkeypatch.setattr(visualize, "_save", lambda figure, path: (save(figure, path), saved.append(figure)))
    return saved


def test_pictures_of_any_aspect_ratio_are_drawn_equally_long(tmp_path, figures):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 4, 4)}
    sizes = [[(90, 30), (30, 90)], [(20, 80), (60, 60)]]
    rows = [[DrawnPicture(torch.ones(3, *size), nothing, "a") for size in row] for row in sizes]
    detection_picture(tmp_path / "p.png", rows, [])
    places = [cell.get_window_extent() for cell in figures[0].axes]
    longest = [max(place.width, place.height) for place in places]
    assert longest == pytest.approx([max(longest)] * 4, rel=0.05)
    for place, (height, width) in zip(places, [*sizes[0], *sizes[1]], strict=True):
        assert place.height / place.width == pytest.approx(height / width)
        assert figures[0].bbox.containsx(place.x0)
        assert figures[0].bbox.containsy(place.y1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_pictures_of_a_pixel_s_width_are_drawn(tmp_path, size):
    image, box = torch.ones(3, *size), torch.tensor([[0.0, 0.0, size[1], size[0]]])
    objects = {"boxes": box, "labels": torch.tensor([1]), "masks": torch.ones(1, *size)}
    detection_picture(tmp_path / "a.png", [[DrawnPicture(image, objects, "")]], ["cat"])
    segmentation_picture(tmp_path / "b.png", [[SegmentedPicture(image, torch.zeros(size).long(), "")]], ["cat"])
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) > 300


def test_objects_without_masks_are_drawn_as_boxes_and_the_first_mask_is_in_front(tmp_path, figures):
    image, boxes = torch.ones(3, 40, 40), torch.tensor([[0.0, 0.0, 40.0, 40.0]] * 2)
    objects = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    detection_picture(tmp_path / "a.png", [[DrawnPicture(image, objects, "")]], ["cat", "dog"])
    masks = torch.zeros(2, 40, 40)
    masks[0, :, :30] = masks[1, :, 10:] = 1
    detection_picture(tmp_path / "b.png", [[DrawnPicture(image, {**objects, "masks": masks}, "")]], ["cat", "dog"])
    plain, drawn = ([cell.get_array() for cell in figure.axes[0].images] for figure in figures)
    assert (len(plain), len(drawn)) == (1, 2)
    first, second = (np.round(255 * np.array(colour)) for colour in matplotlib.colormaps["tab10"].colors[:2])
    assert (drawn[1][20, [5, 20, 29], :3] == first).all()
    assert (drawn[1][20, [30, 39], :3] == second).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("map_size", [(60, 90), (20, 30)])
def test_classes_are_drawn_over_their_pictures(tmp_path, dtype, map_size):
    """A red picture of two classes and none in its thirds: none stays, of the others only the brightness."""
    red = torch.zeros(3, 60, 90)
    red[0] = 1
    labels = torch.tensor([3, 255, 1]).repeat_interleave(map_size[1] // 3).repeat(map_size[0], 1).to(dtype)
    segmentation_picture(tmp_path / "p.png", [[SegmentedPicture(red, labels, "")]], list("abcd"))
    colours = class_colours(4).astype(float)
    for colour, third in (
        (np.array([255, 0, 0]), 1),
        *((0.6 * colours[c] + 0.4 * 255 / 3, t) for c, t in ((3, 0), (1, 2))),
    ):
        rows, columns = places(tmp_path / "p.png", np.round(colour))
        width = Image.open(tmp_path / "p.png").width
        assert width * (third / 3 - 0.02) < columns.min() < columns.max() < width * (third / 3 + 0.36)
        assert len(rows) == pytest.approx((width / 3) * (width * 2 / 3), rel=0.05)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_regions_have_solid_rims(tmp_path, channels):
    labels = torch.zeros(40, 40, dtype=torch.int64)
    labels[10:30, 10:30] = 1
    picture = SegmentedPicture(torch.ones(channels, 40, 40), labels, "title")
    segmentation_picture(tmp_path / "p.png", [[picture] * 2], ["ground", "square"])
    width, height = Image.open(tmp_path / "p.png").size
    side = width / 2 / 2  # of the square, half the picture's
    for number in (0, 1):  # around the square and inside it
        rows, columns = places(tmp_path / "p.png", class_colours(2)[number].astype(int))
        in_first = (rows < 0.85 * height) & (columns < width / 2)  # below is the legend
        rows, columns = rows[in_first], columns[in_first]
        assert np.ptp(rows) == pytest.approx(side, rel=0.07)
        assert np.ptp(columns) == pytest.approx(side, rel=0.07)
        assert side < len(rows) < 0.05 * side**2  # a line, no area


def test_the_legend_names_what_occurs_by_frequency(tmp_path, figures):
    """Over all pictures of the figure together, also names that would be formulas or hidden."""
    first, second = torch.full((8, 8), 255), torch.zeros(8, 8, dtype=torch.int64)
    first[:2], first[2:4, :4] = 5, 2  # 16 and 8 pixels; 64 of the second's
    second[:1] = 2  # 8 more
    second[1, :3] = 4
    rows = [[SegmentedPicture(torch.ones(3, 8, 8), labels, "$a")] for labels in (first, second)]
    segmentation_picture(tmp_path / "p.png", rows, ["_hidden", "absent", r"$\frac$", "absent", "x" * 60, "five"])
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden", r"$\frac$", "five", "x" * 39 + "…"]
    shown = [tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in legend.get_patches()]
    assert shown == [tuple(class_colours(6)[number].tolist()) for number in (0, 2, 5, 4)]


def test_a_long_legend_ends_with_a_number(tmp_path, figures):
    labels = torch.arange(150).repeat_interleave(torch.arange(150) + 1)[:11325].reshape(75, 151)
    for present, more in ((torch.where(labels > 129, labels, 255), None), (labels, "and 130 more")):
        picture = SegmentedPicture(torch.ones(3, 75, 151), present, "")
        segmentation_picture(tmp_path / "p.png", [[picture]], [str(number) for number in range(150)])
        names = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert names == [*map(str, range(149, 129, -1)), *([more] if more else [])]


def test_without_a_class_there_is_no_legend_and_the_picture_as_it_is(tmp_path, figures):
    image = torch.tensor([0.2, 0.4, 0.6])[:, None, None].expand(3, 10, 10)
    segmentation_picture(tmp_path / "p.png", [[SegmentedPicture(image, torch.full((10, 10), 255), "")]], ["a"])
    assert not figures[0].legends
    assert len(places(tmp_path / "p.png", np.array([51, 102, 153]))[0]) > 0.9 * (6 * 120) ** 2


@pytest.mark.parametrize("sizes", [[[(90, 20)]], [[(20, 90)]], [[(90, 20), (20, 90)], [(30, 30)]]])
@pytest.mark.parametrize("name", ["a", "chest of drawers; bureau; dresser", "W" * 50])
def test_the_legend_is_inside_the_figure_and_below_the_pictures(tmp_path, figures, sizes, name):
    rows = [[SegmentedPicture(torch.ones(3, *size), torch.randint(30, size), "title") for size in row] for row in sizes]
    segmentation_picture(tmp_path / "p.png", rows, [name] * 30)
    figure = figures[0]
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    pictures = [cell.get_window_extent() for cell in figure.axes if cell.images]
    assert 0 <= legend.y0 < legend.y1 <= min(place.y0 for place in pictures)
    side = (6 if len(pictures) == 1 else 3.6) * figure.dpi  # the legend takes none of it
    assert [max(place.width, place.height) for place in pictures] == pytest.approx([side] * len(pictures), rel=0.1)


def test_each_class_has_a_colour_of_its_own():
    colours = class_colours(255)
    assert (colours.dtype, colours.shape) == (np.uint8, (255, 3))
    for number in (0, 1, 20, 150):
        assert np.array_equal(class_colours(number), colours[:number])
    assert np.array_equal(class_colours(300), np.concatenate([colours, colours[:45]]))
    assert tuple(colours[0]) == BLUE
    color = pytest.importorskip("skimage.color")
    lab = color.rgb2lab(colours / 255)
    difference = color.deltaE_ciede2000(lab[:, None], lab[None]) + 100 * np.eye(255)
    for number, least in ((20, 10), (50, 7), (150, 3.5), (255, 1.5)):  # of 1 a difference is just seen
        assert difference[:number, :number].min() > least
    assert (np.ptp(colours.astype(int), axis=1) > 30).all()  # none is grey, as the pictures under them are


@pytest.fixture
def only_usual_fonts(monkeypatch):
    """A machine that has matplotlib's own fonts and no others; the list may be added to."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname and "DejaVu" in font.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)

    def forget():
        for known in (visualize._fonts_for, visualize._letters_of):
            known.cache_clear()
        visualize._told_lacking.clear()

    forget()
    yield own
    forget()


def write_font(path, letters):
    """A font of the family "Made" in which each letter is a bar, the next one's twice as wide."""
    builder = FontBuilder(1000)
    names = [f"letter{number}" for number in range(len(letters))]
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names, strict=True)})
    glyphs = {}
    for number, name in enumerate([".notdef", *names]):
        pen = TTGlyphPen(None)
        width = 0 if name == ".notdef" else 200 * 2 ** (number - 1)
        for step, corner in enumerate([(0, 0), (0, 700), (width, 700), (width, 0)]):
            (pen.lineTo if step else pen.moveTo)(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    builder.setupPost()
    builder.save(path)


def named_pictures(tmp_path, name):
    """Pixels of each kind of picture that shows the names of classes."""
    image = torch.zeros(3, 40, 60)
    box = {"boxes": torch.tensor([[5.0, 5, 50, 30]]), "labels": torch.tensor([1]), "masks": torch.zeros(1, 40, 60)}
    visualize.detection_picture(tmp_path / "0.png", [[DrawnPicture(image, box, "")]], [name])
    labels = torch.zeros(40, 60, dtype=torch.long)
    visualize.segmentation_picture(tmp_path / "1.png", [[SegmentedPicture(image, labels, "")]], [name])
    visualize.confusion_picture(tmp_path / "2.png", torch.eye(1), [name])
    visualize.neighbours_picture(tmp_path / "3.png", [[(image, name)]])
    return [np.asarray(Image.open(tmp_path / f"{number}.png").convert("L")).copy() for number in range(4)]


def test_names_are_drawn_in_a_font_that_has_their_letters(tmp_path, only_usual_fonts, caplog, recwarn):
    boxes = [named_pictures(tmp_path, name) for name in ("猫", "犬")]
    assert all(np.array_equal(*pair) for pair in zip(*boxes, strict=True))  # which is what cannot be told apart
    said = [record.message for record in caplog.records]
    assert [message.split(":")[0] for message in said] == [f"no font on this machine has {letter}" for letter in "猫犬"]

    write_font(tmp_path / "made.ttf", "猫犬")
    font_manager.fontManager.addfont(tmp_path / "made.ttf")
    visualize._fonts_for.cache_clear()
    cat, dog = (named_pictures(tmp_path, name) for name in ("猫", "犬"))
    for number, (one, other) in enumerate(zip(cat, dog, strict=True)):
        assert one.shape == other.shape
        # The bar of the second is twice as wide; on pictures it is white, beside them black.
        of_text = (lambda picture: picture > 240) if number == 0 else (lambda picture: picture < 100)
        assert np.count_nonzero(of_text(other)) > np.count_nonzero(of_text(one))
    mixed = named_pictures(tmp_path, "cat 猫")
    assert not np.array_equal(mixed[3], cat[3])
    assert len(caplog.records) == 2
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_latin_and_cyrillic_names_need_no_other_font(only_usual_fonts):
    assert visualize._fonts_for(frozenset("cat, Katze, кошка, γάτα")) == ((), frozenset())
    assert visualize._fonts_for(frozenset("a\n\t\u200b")) == ((), frozenset())


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_thin_images_are_drawn(tmp_path, size):
    image, labels = torch.full((3, *size), 0.5), torch.zeros(size, dtype=torch.uint8)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, *size)}
    detection_picture(tmp_path / "d.png", [[DrawnPicture(image, nothing, "")]], ["a"])
    segmentation_picture(tmp_path / "s.png", [[SegmentedPicture(image, labels, "")]], ["a"])
    for name in ("d.png", "s.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) >= 10
