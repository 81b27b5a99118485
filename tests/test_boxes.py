"Boxes as targets: five file formats, the grid, tiles, crops. Fixtures are written in each format's real layout."

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.warp import transform

from rs_selfsup.data.augment import Augment, Batch, move_boxes
from rs_selfsup.data.boxes import IGNORE, UNKNOWN, box_format, corners, cut, on_ground, seen
from rs_selfsup.data.loading import dataloaders, eval_loader
from rs_selfsup.data.rasters import TargetSpec, load_scenes, parse_target
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import Journal, TileStore, build_store
from rs_selfsup.modalities import DataError, preset
from rs_selfsup.randomness import keys

W, H = 80, 60
X0, Y0 = 400000.0, 5400000.0
RGB = dict(preset="rgb", gsd=0.5)
# class, x, y, w, h, angle in pixels of the image: a car standing slanted, a building, a difficult ship
TURNED = np.array([[0, 30, 20, 16, 6, 0.5], [1, 60, 40, 20, 12, -0.8], [2, 15, 45, 12, 4, 1.2]])
NAMES = ["car", "building", "ship"]


def raster(path, w=W, h=H, gsd=0.5, crs="EPSG:32631", x0=X0, y0=Y0, seed=0):
    "A three-band image; `crs=None`: a plain PNG without a place"
    x = np.random.default_rng(seed).integers(1, 255, (3, h, w), np.uint8)
    place = dict(driver="GTiff", crs=crs, transform=from_origin(x0, y0, gsd, gsd)) if crs else dict(driver="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", height=h, width=w, count=3, dtype="uint8", **place) as f:
        f.write(x)
    return str(path)


def upright(b):
    "The upright boxes around turned ones: x0, y0, x1, y1"
    p = corners(b)
    return np.concatenate([p.min(1), p.max(1)], 1)


def geojson(path, b=TURNED, to="EPSG:32631", said=True, prop="kind"):
    "Polygons in a projection, the ring closed, counter-clockwise as RFC 7946 wants it"
    features = []
    for o, p in zip(b, corners(b)):
        x, y = X0 + 0.5 * p[:, 0], Y0 - 0.5 * p[:, 1]
        if to != "EPSG:32631":
            x, y = transform("EPSG:32631", to, x, y)
        ring = [list(map(float, c)) for c in zip(x, y)][::-1]
        shape = dict(type="Polygon", coordinates=[[*ring, ring[0]]])
        features.append(dict(type="Feature", id=len(features), properties={prop: NAMES[int(o[0])], "first": True}, geometry=shape))
    d = dict(type="FeatureCollection", features=features)
    if said:
        d["crs"] = dict(type="name", properties=dict(name="urn:ogc:def:crs:" + to.replace(":", "::")))
    path.write_text(json.dumps(d))
    return str(path)


def coco(path, b=TURNED, name="a.tif", more=(), **kw):
    "Image list, categories with numbers of their own, boxes as corner and size"
    boxes = [[x, y, u - x, v - y] for x, y, u, v in upright(b).tolist()]
    notes = [
        dict(id=10 + i, image_id=5, category_id=3 * int(o[0]) + 1, bbox=q, area=q[2] * q[3], iscrowd=int(o[0] == 2),
             segmentation=[corners(o).ravel().tolist()])
        for i, (o, q) in enumerate(zip(b, boxes))
    ]  # fmt: skip
    images = [dict(id=5, file_name=name, width=W, height=H), dict(id=6, file_name="empty.tif", width=W, height=H)]
    cats = [dict(id=3 * i + 1, name=n, supercategory="") for i, n in enumerate(NAMES)]
    path.write_text(json.dumps(dict(info={}, licenses=[], images=images, categories=cats, annotations=[*notes, *more], **kw)))
    return str(path)


def voc(path, b=TURNED, turned=False):
    "The layout of the VOC devkit; pixels count from 1 and both ends belong to the box"
    out = []
    for o, (x, y, u, v) in zip(b, upright(b)):
        if turned:
            q = "<robndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("cx", "cy", "w", "h", "angle"), [*o[1:5], o[5] % math.pi])) + "</robndbox>"
        else:
            q = f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{u}</xmax><ymax>{v}</ymax></bndbox>"
        about = f"<name>{NAMES[int(o[0])]}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>{int(o[0] == 2)}</difficult>"
        out.append(f"<object>{about}{q}</object>")
    size = f"<size><width>{W}</width><height>{H}</height><depth>3</depth></size>"
    path.write_text(f"<annotation><filename>a.tif</filename>{size}{''.join(out)}</annotation>")
    return str(path)


def dota(path, b=TURNED):
    "Headings, then eight numbers, the class, 1 for difficult"
    lines = [" ".join(f"{v:.6f}" for v in corners(o).ravel()) + f" {NAMES[int(o[0])]} {int(o[0] == 2)}" for o in b]
    path.write_text("imagesource:GoogleEarth\ngsd:0.5\n" + "\n".join(lines) + "\n")
    return str(path)


def yolo(path, b=TURNED, turned=False):
    "Fractions of the image"
    if turned:
        lines = [f"{int(o[0])} " + " ".join(f"{v:.8f}" for v in (corners(o) / [W, H]).ravel()) for o in b]
    else:
        lines = [f"{int(o[0])} {(x + u) / 2 / W:.8f} {(y + v) / 2 / H:.8f} {(u - x) / W:.8f} {(v - y) / H:.8f}" for o, (x, y, u, v) in zip(b, upright(b))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def describe(image, boxes, gsd=0.5, more=None, **kw):
    "Scenes of one scene with one target of boxes"
    target = dict(kind="boxes", classes=NAMES, **kw)
    return load_scenes(
        dict(anchor="rgb", modalities=dict(rgb=dict(RGB, gsd=gsd)), targets=dict(objects=target),
             scenes=[dict(name="a", rasters=dict(rgb=image), targets=dict(objects=boxes) if boxes else {})])
    )  # fmt: skip


def read(*args, **kw):
    with describe(*args, **kw).open(0) as r:
        return r.boxes("objects")


WHOLE = np.concatenate([TURNED[:2], [[IGNORE, *TURNED[2, 1:]]]])  # the ship is difficult
FLAT = np.array([[c, (x + u) / 2, (y + v) / 2, u - x, v - y, 0] for c, (x, y, u, v) in zip((0, 1, IGNORE), upright(TURNED))])


@pytest.mark.parametrize(
    "write, end, kw, want",
    [
        (coco, "json", {}, FLAT),
        (coco, "json", dict(rotated=True), WHOLE),
        (voc, "xml", {}, FLAT),
        (lambda p: voc(p, turned=True), "xml", {}, WHOLE),
        (dota, "txt", {}, WHOLE),
        (dota, "txt", dict(rotated=False), FLAT),
        (yolo, "txt", {}, np.c_[TURNED[:, 0], FLAT[:, 1:]]),
        (lambda p: yolo(p, turned=True), "txt", {}, TURNED),
        (geojson, "geojson", dict(class_property="kind"), TURNED),
        (geojson, "json", dict(class_property="kind", rotated=False), np.c_[TURNED[:, 0], FLAT[:, 1:]]),
        (lambda p: geojson(p, to="EPSG:4326", said=False), "geojson", dict(class_property="kind"), TURNED),
        (lambda p: geojson(p, to="EPSG:32632"), "geojson", dict(class_property="kind"), TURNED),
    ],
)  # fmt: skip
def test_every_format_gives_the_same_boxes(tmp_path, write, end, kw, want):
    image = raster(tmp_path / "a.tif")
    got = read(image, write(tmp_path / f"boxes.{end}"), **kw)
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert got[:, 5].min() >= -math.pi / 2 and got[:, 5].max() < math.pi / 2


def test_pixel_formats_and_geojson_on_an_image_without_a_place(tmp_path):
    image = raster(tmp_path / "a.png", crs=None)
    np.testing.assert_allclose(read(image, dota(tmp_path / "a.txt")), WHOLE, atol=1e-4)
    d = json.loads(open(geojson(tmp_path / "g.geojson", said=False)).read())
    for f, p in zip(d["features"], corners(TURNED)):
        f["geometry"]["coordinates"] = [[*p.tolist(), p[0].tolist()]]  # pixels
    (tmp_path / "g.geojson").write_text(json.dumps(d))
    np.testing.assert_allclose(read(image, str(tmp_path / "g.geojson"), class_property="kind"), TURNED, atol=1e-6)


def test_boxes_follow_the_grid_when_the_file_is_finer(tmp_path):
    image = raster(tmp_path / "a.tif")
    half = lambda b: np.c_[b[:, 0], b[:, 1:5] / 2, b[:, 5]]
    np.testing.assert_allclose(read(image, dota(tmp_path / "a.txt"), gsd=1.0), half(WHOLE), atol=1e-4)
    np.testing.assert_allclose(read(image, geojson(tmp_path / "g.geojson"), gsd=1.0, class_property="kind"), half(TURNED), atol=1e-4)


def test_boxes_follow_the_grid_when_it_starts_elsewhere(tmp_path):
    "A 2 m layer whose corners meet those of the image one pixel further in moves the grid, and the boxes with it"
    image = raster(tmp_path / "a.tif")
    with rasterio.open(tmp_path / "h.tif", "w", driver="GTiff", height=14, width=19, count=1, dtype="float32", crs="EPSG:32631",
                       transform=from_origin(X0 + 0.5, Y0 - 0.5, 2, 2)) as f:  # fmt: skip
        f.write(np.ones((1, 14, 19), np.float32))
    S = load_scenes(
        dict(anchor="rgb", modalities=dict(rgb=RGB, dsm=dict(preset="dsm", gsd=2)), targets=dict(o=dict(kind="boxes", classes=NAMES)),
             scenes=[dict(name="a", rasters=dict(rgb=image, dsm=str(tmp_path / "h.tif")), targets=dict(o=dota(tmp_path / "a.txt")))])
    )  # fmt: skip
    with S.open(0) as r:
        shift = (np.array(~r.transform * (X0, Y0)) * 1.0).tolist()
        assert shift == [-1, -1]
        np.testing.assert_allclose(r.boxes("o"), WHOLE + [0, -1, -1, 0, 0, 0], atol=1e-4)
        window = r.read_boxes(10, 20, 20, 30)["o"]
        np.testing.assert_allclose(window[0], WHOLE[0] + [0, -21, -11, 0, 0, 0], atol=1e-4)


def test_none_and_unknown_differ(tmp_path):
    image, other, empty = (raster(tmp_path / n) for n in ("a.tif", "b.tif", "empty.tif"))
    file = coco(tmp_path / "c.json")
    assert read(other, file) is None and read(image, None) is None
    assert read(empty, file).shape == (0, 6)
    (tmp_path / "none.txt").write_text("")
    assert read(image, str(tmp_path / "none.txt")).shape == (0, 6)
    (tmp_path / "none.geojson").write_text(json.dumps(dict(type="FeatureCollection", features=[])))
    assert read(image, str(tmp_path / "none.geojson")).shape == (0, 6)


def test_classes_by_name_by_number_and_to_be_ignored(tmp_path):
    image, file = raster(tmp_path / "a.tif"), dota(tmp_path / "a.txt")
    two = parse_target("o", dict(kind="boxes", classes={"car": "vehicle", "ship": "vehicle", "building": "house"}))
    assert (two.classes, two.values) == (["vehicle", "house"], [["car", "ship"], ["building"]])
    S = describe(image, file)
    S.targets["objects"] = replace(two, ignore=["ship"], values=[["car"], ["building"]])
    with S.open(0) as r:
        assert r.boxes("objects")[:, 0].tolist() == [0, 1, -1]
    one = describe(image, geojson(tmp_path / "g.geojson"), where=dict(kind="ship"))
    one.targets["objects"].classes, one.targets["objects"].values = ["ship"], [[0]]
    with one.open(0) as r:
        np.testing.assert_allclose(r.boxes("objects"), [[0, *TURNED[2, 1:]]], atol=1e-3)


LINE = "10 10 20 10 20 20 10 20 car 0\n"
NOTE = dict(id=77, image_id=5, category_id=1)
BND = "<annotation><object><name>car</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"


@pytest.mark.parametrize(
    "end, text, which, problem",
    [
        ("txt", LINE + "90 10 99 10 99 20 90 20 car 0\n", "line 2", "lies outside the image: x from 90 to 99"),
        ("txt", "gsd:1\n\n" + LINE + "1 1 1 1 1 1 1 1 car 0\n", "line 4", "zero area"),
        ("txt", "1 1 5 1 nan 4 1 4 car 0\n", "line 1", "not finite"),
        ("txt", "1 1 5 1 x 4 1 4 car 0\n", "line 1", "are no numbers"),
        ("txt", LINE.replace("car", "cra"), "line 1", "Did you mean 'car'?"),
        ("txt", "1 2 3 4 car\n" + LINE, "line 1", ""),
        ("txt", "7 0.5 0.5 0.1 0.1\n", "line 1", "unknown class"),
        ("txt", "0 0.5 0.5 -0.1 0.1\n", "line 1", "corners are swapped"),
        ("txt", "0 0.5 0.5 0 0.1\n", "line 1", "zero area"),
        ("txt", "0 40 30 10 10\n", "line 1", "no fractions"),
        ("xml", BND.format(20, 5, 10, 9), "object 1", "corners are swapped, x runs from 20 to 10"),
        ("xml", BND.format(20, 5, 30, 5), "object 1", "zero area"),
        ("xml", BND.format(200, 5, 230, 15), "object 1", "lies outside the image"),
        ("xml", BND.format(20, 5, "inf", 15), "object 1", "not finite"),
        ("xml", "<annotation><object></annotation>", "", "this is not XML"),
        ("json", dict(bbox=[10, 10, -4, 5]), "annotation 77", "corners are swapped"),
        ("json", dict(bbox=[10, 10, 4, 0]), "annotation 77", "zero area"),
        ("json", dict(bbox=[10, 10, 4]), "annotation 77", "is not [x, y, width, height]"),
        ("json", dict(bbox=[-50, 10, 40, 5]), "annotation 77", "lies outside the image"),
        ("json", dict(bbox=[10, 10, float("nan"), 5]), "annotation 77", "not finite"),
        ("json", dict(bbox=[10, 10, 4, 5], category_id=99), "annotation 77", "unknown class"),
        ("json", "{", "", "this is not JSON"),
    ],
)  # fmt: skip
def test_bad_annotations_are_named(tmp_path, end, text, which, problem):
    image, file = raster(tmp_path / "a.tif"), tmp_path / f"bad.{end}"
    if isinstance(text, dict):
        coco(file, more=[{**NOTE, **text}])
    else:
        file.write_text(text)
    with pytest.raises(DataError) as e:
        read(image, str(file))
    assert e.value.file == str(file) and which in e.value.problem and problem in str(e.value), e.value


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda f: f["properties"].pop("kind"), "feature 2 (id 1) has no property 'kind'. Write class_property: one of first"),
        (lambda f: f["properties"].update(kind="hut"), "unknown class in feature 2 (id 1) 'hut'"),
        (lambda f: f.update(geometry=dict(type="Point", coordinates=[X0, Y0])), "feature 2 (id 1) is a Point"),
        (lambda f: f.update(geometry=None, bbox=[X0 + 9, Y0 - 9, X0 + 5, Y0 - 5]), "feature 2 (id 1): the corners are swapped"),
        (lambda f: f.update(geometry=None, bbox=[X0 + 5, Y0 - 9, X0 + 5, Y0 - 5]), "feature 2 (id 1): a box of zero area"),
        (lambda f: f["geometry"]["coordinates"][0].__setitem__(0, [X0, None]), "are no numbers"),
        (lambda f: f.update(geometry=None, bbox=[X0 - 99, Y0 - 9, X0 - 90, Y0 - 5]), "feature 2 (id 1) lies outside the image"),
    ],
)  # fmt: skip
def test_bad_features_are_named(tmp_path, change, problem):
    image, file = raster(tmp_path / "a.tif"), geojson(tmp_path / "g.geojson")
    d = json.loads((tmp_path / "g.geojson").read_text())
    change(d["features"][1])
    (tmp_path / "g.geojson").write_text(json.dumps(d))
    with pytest.raises(DataError, match="g.geojson") as e:
        read(image, file, class_property="kind")
    assert problem in str(e.value), e.value


def test_other_mistakes(tmp_path):
    image = raster(tmp_path / "a.tif")
    with pytest.raises(DataError, match="are no degrees. Write crs: EPSG"):
        read(image, geojson(tmp_path / "g.geojson", said=False), class_property="kind")
    file = dict(path=geojson(tmp_path / "g.geojson", said=False), crs="EPSG:32631")
    np.testing.assert_allclose(read(image, file, class_property="kind"), TURNED, atol=1e-3)
    with pytest.raises(DataError, match="there is no such file"):
        read(image, str(tmp_path / "nothing.txt"))
    with pytest.raises(DataError, match="'.shp' is none of the known kinds"):
        (tmp_path / "a.shp").write_text("x")
        read(image, str(tmp_path / "a.shp"))
    with pytest.raises(DataError, match="has 3 pixels|is 80 x 60 pixels here, the file 81 x 60"):
        read(raster(tmp_path / "b" / "a.tif", w=81), coco(tmp_path / "c.json"))
    with pytest.raises(DataError, match="no classes"):
        parse_target("o", dict(kind="boxes"))
    with pytest.raises(DataError, match="no share of an area"):
        parse_target("o", dict(kind="boxes", classes=["a"], least=0))
    with pytest.raises(DataError, match="tile_label: 'o' is a target of boxes"):
        load_scenes(dict(anchor="rgb", modalities=dict(rgb=RGB), targets=dict(o=dict(kind="boxes", classes=["a"])), tile_label="o",
                         scenes=[dict(name="a", rasters=dict(rgb=image))]))  # fmt: skip


def test_partly_outside(tmp_path):
    "Upright boxes are cut at the image's border, turned ones stay; a centre outside makes them class -1"
    image = raster(tmp_path / "a.tif")
    edge = np.array([[0, 2, 20, 16, 6, 0.0], [1, -2, 40, 20, 12, 0.3], [0, 78, 30, 12, 4, 1.2]])
    flat = read(image, coco(tmp_path / "c.json", edge))
    x0, x1 = flat[:, 1] - flat[:, 3] / 2, flat[:, 1] + flat[:, 3] / 2
    assert x0[0] == pytest.approx(0) and x0[1] == pytest.approx(0) and x1[2] == pytest.approx(80) and x1[0] == pytest.approx(10)
    turned = read(image, dota(tmp_path / "a.txt", edge))
    np.testing.assert_allclose(turned[:, 1:], edge[:, 1:], atol=1e-4)
    assert turned[:, 0].tolist() == [0, IGNORE, 0]


def test_one_file_for_many_scenes(tmp_path):
    "COCO by image name, with the folder where names repeat; GeoJSON by place"
    for n in ("x/a.tif", "y/a.tif"):
        raster(tmp_path / n)
    file = tmp_path / "c.json"
    coco(file, name="x/a.tif")
    d = json.loads(file.read_text())
    d["images"][1]["file_name"] = "y/a.jpg"
    file.write_text(json.dumps(d))
    base = dict(anchor="rgb", modalities=dict(rgb=RGB), targets=dict(o=dict(kind="boxes", classes=NAMES)))
    look = dict(root=str(tmp_path), rasters=dict(rgb="{scene}/a.tif"), targets=dict(o="c.json"))
    S = load_scenes(dict(base, discover=look))
    counts = {}
    for s in S:
        with S.open(s.name) as r:
            counts[s.name] = len(r.boxes("o"))
    assert counts == dict(x=3, y=0) and all(s.targets["o"].shared for s in S)
    raster(tmp_path / "z" / "a.tif", x0=X0 + 0.5 * W)  # the neighbour to the east
    both = np.concatenate([TURNED, TURNED[:1] + [0, W, 0, 0, 0, 0]])
    geojson(tmp_path / "g.geojson", both)
    base["targets"]["o"]["class_property"] = "kind"
    S = load_scenes(dict(base, discover=dict(look, targets=dict(o="g.geojson"))))
    with S.open("x") as r, S.open("z") as q:
        np.testing.assert_allclose(r.boxes("o"), TURNED, atol=1e-3)
        np.testing.assert_allclose(q.boxes("o"), TURNED[:1], atol=1e-3)


def test_one_file_per_scene_by_pattern(tmp_path):
    for n in ("a", "b"):
        raster(tmp_path / "img" / f"{n}.tif")
    (tmp_path / "txt").mkdir()
    dota(tmp_path / "txt" / "a.txt")
    S = load_scenes(
        dict(anchor="rgb", modalities=dict(rgb=RGB), targets=dict(o=dict(kind="boxes", classes=NAMES)),
             discover=dict(root=str(tmp_path), rasters=dict(rgb="img/{scene}.tif"), targets=dict(o="txt/{scene}.txt")))
    )  # fmt: skip
    with S.open("a") as r, S.open("b") as q:
        assert len(r.boxes("o")) == 3 and q.boxes("o") is None


def random_boxes(n, side, rng, rotated=True):
    b = np.c_[rng.integers(0, 3, n), rng.uniform(-5, side + 5, (n, 2)), rng.uniform(2, side / 3, (n, 2)), rng.uniform(-1.57, 1.57, n)]
    b[:, 3:5] = -np.sort(-b[:, 3:5], 1)
    if not rotated:
        b[:, 5] = 0
    return b


@pytest.mark.parametrize("rotated", [False, True])
def test_numpy_and_torch_agree(rotated):
    b = random_boxes(300, 40, np.random.default_rng(0), rotated)
    one, other = seen(b, (40, 30), rotated), seen(torch.tensor(b), (40, 30), rotated, xp=torch)
    np.testing.assert_allclose(other.numpy(), one, atol=1e-9)
    assert 30 < np.isnan(one[:, 0]).sum() < 270 and (one[:, 0] == IGNORE).any()


def paint(b, side):
    "The pixels of one box, as shares of 8 x 8 points"
    y, x = (np.mgrid[: side * 8, : side * 8] + 0.5) / 8
    u, v = (x - b[1]) * math.cos(b[5]) + (y - b[2]) * math.sin(b[5]), (y - b[2]) * math.cos(b[5]) - (x - b[1]) * math.sin(b[5])
    inside = (abs(u) <= b[3] / 2) & (abs(v) <= b[4] / 2)
    return inside.reshape(side, 8, side, 8).mean((1, 3)).astype(np.float32)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.8, 1.3)])
def test_boxes_move_with_the_pixels(rotated, scale, one_thread):
    "The picture of a box, moved, is the picture of the moved box; what stays and what is ignored follows the share seen"
    rng, side, crop, B = np.random.default_rng(1), 40, 24, 120
    b = random_boxes(B, side, rng, rotated)
    b[:, 0] = 1
    pictures = np.stack([paint(o, side) for o in b])
    t = torch.tensor(b, dtype=torch.float32)[:, None]
    x = torch.tensor(pictures)[:, None]
    batch = Batch(dict(rgb=x), dict(rgb=torch.ones_like(x) > 0), dict(o=t), key=keys(0, 0, torch.arange(B)))
    spec = TargetSpec("boxes", ["a", "b"], rotated=rotated)
    out = Augment(dict(rgb=preset("rgb", gsd=1)), crop, scale=scale, boxes=dict(o=spec)).geometry(batch)
    got, moved = out.targets["o"][:, 0].numpy(), out.images["rgb"][:, 0].numpy()
    kinds = dict(kept=0, ignored=0, gone=0)
    for o, p, was in zip(got, moved, b):
        if np.isnan(o).any():
            assert np.isnan(o).all()
            kinds["gone"] += 1
            if scale == (1, 1):
                assert p.sum() <= 0.1 * was[3] * was[4] + 1
            continue
        kinds["ignored" if o[0] == IGNORE else "kept"] += 1
        again = paint(o, crop)
        assert abs(again - p).sum() < (0.5 + 0.06 * p.sum() if scale == (1, 1) else 3 + 0.2 * p.sum()), (o, was)
        if scale == (1, 1):
            share = p.sum() / (was[3] * was[4])
            assert share > 0.08 and (share > 0.48 if o[0] == 1 else share < 0.52)
        assert -math.pi / 2 <= o[5] < math.pi / 2
        if not rotated:
            assert o[5] == 0 and o[1] - o[3] / 2 > -1e-3 and o[1] + o[3] / 2 < crop + 1e-3
    assert min(kinds.values()) > 2, kinds


def test_special_rows_survive(one_thread):
    "Unknown stays unknown, ignore stays ignore, padding stays NaN; every sample on its own"
    nan, spec = float("nan"), TargetSpec("boxes", ["a"], rotated=True)
    t = torch.tensor([[[UNKNOWN, nan, nan, nan, nan, nan], [nan] * 6], [[-1, 20, 20, 4, 2, 0.3], [nan] * 6], [[0, 20, 20, 4, 2, 0], [0, 2, 20, 4, 2, 0.1]]])
    x = torch.rand(3, 1, 40, 40)
    batch = Batch(dict(rgb=x), dict(rgb=torch.ones_like(x) > 0), dict(o=t), key=keys(0, 0, torch.arange(3)))
    for kw in (dict(), dict(scale=(0.7, 1.4))):
        a = Augment(dict(rgb=preset("rgb", gsd=1)), 24, boxes=dict(o=spec), **kw)
        o = a.geometry(batch).targets["o"]
        assert o[0, 0, 0] == UNKNOWN and torch.isnan(o[0, 0, 1:]).all() and torch.isnan(o[0, 1]).all() and torch.isnan(o[1, 1]).all()
        assert o[1, 0, 0] == -1 or torch.isnan(o[1, 0]).all()
        alone = torch.cat([a.geometry(batch.index(slice(i, i + 1))).targets["o"] for i in range(3)])
        assert torch.equal(torch.nan_to_num(alone, 7), torch.nan_to_num(o, 7))
        assert a.fixed().boxes == a.boxes
    still = a.fixed().geometry(batch).targets["o"]  # the middle of the tile: 8 pixels less on each side
    torch.testing.assert_close(still[1, 0], t[1, 0] - torch.tensor([0, 8, 8, 0, 0, 0.0]))


def test_quarter_turns():
    "All eight symmetries: a turned box keeps its sides and stays in [-pi/2, pi/2), an upright one swaps them"
    b = torch.tensor([[[1, 4, 10, 6, 2, -math.pi / 2], [1, 10, 4, 6, 2, 0.4]]])
    flat = b * torch.tensor([1, 1, 1, 1, 1, 0])
    one = torch.ones(1, 2)
    for signs in (one, one * torch.tensor([1, -1]), one * torch.tensor([-1, 1]), -one):
        for swap in (False, True):
            by = signs, torch.where(signs < 0, 20.0, 0.0), torch.tensor([swap])
            o = move_boxes(b, by, (20, 20), True)[0]
            assert (o[:, 3] == 6).all() and (o[:, 5] >= -1.5708).all() and (o[:, 5] < math.pi / 2).all()
            q = move_boxes(flat, by, (20, 20), False)[0]
            assert (q[:, 3] == (2 if swap else 6)).all() and (q[:, 5] == 0).all()
            p, want = corners(o.double().numpy()), corners(b[0].double().numpy())[..., ::-1] * signs.numpy() + by[1].numpy()
            p, want = (np.sort(np.round(k.reshape(2, 4, 2) @ [1.0, 1000.0], 2), 1) for k in (p, want if swap else want[..., ::-1]))
            np.testing.assert_allclose(p, want, atol=0.05)


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    "Two generated scenes, the second one without its boxes, and the store of them"
    folder = tmp_path_factory.mktemp("town")
    yaml = write_scenes(folder / "scenes", 3, 96.0, seed=0, modalities=("rgb",), progress=False, collars=1.0)
    S = load_scenes(yaml)
    S.scenes[2].targets.pop("buildings")
    return S, build_store(S, folder / "store", tile=48, progress=False, splits=(1, 0, 0), min_valid=0.1), folder


def test_generated_scenes_carry_their_buildings(town):
    "The file's own box, the first date only, and the land cover under it"
    S, store, folder = town
    n = 0
    for i in (0, 1):
        with S.open(i) as r:
            b, cover = r.boxes("buildings"), r.read_targets(0, 0, r.height, r.width)["landcover"]
        f = [o["properties"] for o in json.loads((folder / "scenes" / S[i].name / "buildings.geojson").read_text())["features"]]
        f = [o for o in f if o["first"]]
        n += len(b)
        assert len(b) == len(f)
        if not f:
            continue
        assert [S.targets["buildings"].classes[int(k)] for k in b[:, 0].clip(0)] == [o["kind"] if k >= 0 else "house" for o, k in zip(f, b[:, 0])]
        want = np.array([o["box"] for o in f])
        np.testing.assert_allclose(b[:, 1:3], want[:, :2], atol=0.05)
        np.testing.assert_allclose(b[:, 3:5], -np.sort(-want[:, 2:4], 1), atol=0.08)
        building = S.targets["landcover"].classes.index("building")
        for o in b:
            p = paint(o, r.height)
            assert (p * (cover == building)).sum() > 0.6 * p.sum() or p.sum() < 20
    assert n > 6


def test_store_gives_what_the_scenes_have(town):
    S, store, _ = town
    spec, index = store.targets["buildings"], store.index
    assert spec.kind == "boxes" and spec.rotated is True and spec.classes == ["house", "garage", "hall"]
    t = store.read(np.arange(len(store)))["targets"]["buildings"]
    assert t.dtype == np.float32 and t.shape == (len(store), max(1, index.boxes_buildings.max()), 6)
    for i, row in index.iterrows():
        if row.scene == "scene_02":
            assert row.boxes_buildings == -1 and t[i, 0, 0] == UNKNOWN and np.isnan(t[i, 0, 1:]).all() and np.isnan(t[i, 1:]).all()
            continue
        with S.open(row.scene, check=False) as r:
            want = r.read_boxes(row.row, row.col, 48, 48)["buildings"]
            valid = r.read(row.row, row.col, 48, 48)[1]["rgb"]
        want = on_ground(want, valid)
        assert row.boxes_buildings == len(want)
        np.testing.assert_allclose(t[i, : len(want)], want, atol=1e-4)
        assert np.isnan(t[i, len(want) :]).all()
    n = store.report["boxes"]["buildings"]["train"]
    known = t[t[:, 0, 0] != UNKNOWN][..., 0]
    assert [n[k] for k in spec.classes] == [(known == k).sum() for k in range(3)] and n["ignore"] == (known == -1).sum() > 0
    assert n["unknown"] == (index.scene == "scene_02").sum() and n["tiles"] == len(store) and n["empty"] == (index.boxes_buildings == 0).sum()
    assert "## Boxes: buildings" in (store.path / "report.md").read_text()
    assert store.read([0])["targets"]["buildings"].shape[1] == max(1, index.boxes_buildings[0])


def test_a_stopped_build_ends_with_the_same_bytes(town, tmp_path, monkeypatch):
    S, store, folder = town

    class Kill(BaseException):
        pass

    add = Journal.add

    def dying(self, **d):
        add(self, **d)
        if len(self.entries) == 2:
            raise Kill

    monkeypatch.setattr(Journal, "add", dying)
    with pytest.raises(Kill):
        build_store(S, tmp_path / "again", tile=48, progress=False, splits=(1, 0, 0), min_valid=0.1)
    monkeypatch.setattr(Journal, "add", add)
    build_store(S, tmp_path / "again", tile=48, progress=False, splits=(1, 0, 0), min_valid=0.1)
    files = lambda p: {f.relative_to(p): f.read_bytes() for f in p.rglob("*") if f.is_file()}
    assert files(tmp_path / "again") == files(store.path)
    S2 = load_scenes(folder / "scenes" / "scenes.yaml")
    S2.scenes[2].targets.pop("buildings")
    S2.targets["buildings"].least = 0.7
    with pytest.raises(DataError, match="other settings"):
        build_store(S2, tmp_path / "again", tile=48, progress=False, splits=(1, 0, 0), min_valid=0.1)


def test_what_is_broken_says_so(town, tmp_path):
    store = town[1]
    bad = shutil.copytree(store.path, tmp_path / "bad")
    with open(bad / "target_buildings" / "c.0.0", "r+b") as f:
        f.truncate(24)
    with pytest.raises(DataError, match="holds 1 of .* boxes"):
        TileStore(bad)
    import xarray

    ds = xarray.open_zarr(store.path)
    assert ds.target_buildings.shape == (store.index.boxes_buildings.clip(lower=0).sum(), 6)
    assert (ds.boxes_buildings.values == store.index.boxes_buildings).all()


def test_stores_without_boxes_are_as_before(tmp_path):
    "Neither new keys in store.json nor columns in the index, so stores of before open, and new ones open elsewhere"
    yaml = write_scenes(tmp_path / "scenes", 1, 48.0, modalities=("rgb",), progress=False)
    S = load_scenes(yaml)
    del S.targets["buildings"]
    for s in S:
        s.targets.pop("buildings")
    store = build_store(S, tmp_path / "store", tile=48, progress=False, splits=(1, 0, 0), min_valid=0)
    d = json.loads((tmp_path / "store" / "store.json").read_text())
    assert not {"rotated", "least", "class_property", "where", "format"} & set(d["targets"]["landcover"]) and "boxes" not in d["asked"]
    assert not [c for c in store.index if c.startswith("boxes")] and "boxes" not in store.report
    assert TileStore(store.path).targets["height"].kind == "regression"


def test_a_scene_with_bad_boxes_is_left_out_and_named(tmp_path):
    images = {n: raster(tmp_path / f"{n}.tif", x0=X0 + 500 * i) for i, n in enumerate("ab")}
    scenes = [dict(name=n, rasters=dict(rgb=p), targets=dict(o=str(tmp_path / f"{n}.txt"))) for n, p in images.items()]
    dota(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("1 1 1 1 1 1 1 1 car 0\n")
    doc = dict(anchor="rgb", modalities=dict(rgb=RGB), targets=dict(o=dict(kind="boxes", classes=NAMES)), scenes=scenes)
    store = build_store(load_scenes(doc), tmp_path / "store", tile=20, progress=False, splits=(1, 0, 0))
    assert set(store.index.scene) == {"a"} and "line 1: a polygon of zero area" in store.report["failed"]["b"]
    assert store.targets["o"].rotated is True  # DOTA


def test_the_way_to_a_batch(town, one_thread):
    store = town[1]
    dls = dataloaders(store, bs=6, crop=32, device="cpu", splits="train")
    b = dls.one_batch()[0]
    t = b.targets["buildings"]
    assert t.ndim == 3 and t.shape[0] == 6 and t.shape[2] == 6 and t.dtype == torch.float32
    ok = ~torch.isnan(t[..., 1])
    assert (torch.isnan(t).all(-1) | ok | (t[..., 0] == UNKNOWN)).all()
    plain = next(iter(eval_loader(store, None, bs=len(store), device="cpu", targets=True))).targets["buildings"]
    np.testing.assert_array_equal(plain.numpy(), store.read(np.arange(len(store)))["targets"]["buildings"])
    middle = next(iter(eval_loader(store, None, bs=len(store), device="cpu", targets=True, crop=32))).targets["buildings"]
    i = int(np.argmax(store.index.boxes_buildings))
    want = seen(plain[i].double().numpy() - [0, 8, 8, 0, 0, 0], (32, 32), True)
    np.testing.assert_allclose(middle[i].numpy(), want, atol=1e-4)


def test_upright_boxes_are_cut_by_tiles(tmp_path):
    "Over four tiles, a box is whole in one, cut in its neighbour by the half rule, ignored, or left out"
    image = raster(tmp_path / "a.tif", w=40, h=40)
    b = np.array([[0, 10, 10, 8, 8, 0], [1, 18, 10, 10, 8, 0], [2, 30, 19.5, 8, 8, 0.0]])
    file = coco(tmp_path / "c.json", b)
    d = json.loads((tmp_path / "c.json").read_text())
    d["images"][0].update(width=40, height=40)
    d["annotations"][2]["iscrowd"] = 0
    (tmp_path / "c.json").write_text(json.dumps(d))
    store = build_store(describe(image, file), tmp_path / "store", tile=20, progress=False, splits=(1, 0, 0), buffer=0)
    t = store.read(range(4))["targets"]["objects"]
    np.testing.assert_allclose(t[0, :2], [[0, 10, 10, 8, 8, 0], [1, 16.5, 10, 7, 8, 0]], atol=1e-5)  # 70 % of the second
    np.testing.assert_allclose(t[1, :2], [[-1, 1.5, 10, 3, 8, 0], [2, 10, 17.75, 8, 4.5, 0]], atol=1e-5)  # 30 % of it: ignored
    assert np.isnan(t[2]).all()
    np.testing.assert_allclose(t[3, :1], [[-1, 10, 1.75, 8, 3.5, 0]], atol=1e-5)
    assert store.targets["objects"].rotated is False


@pytest.mark.data
def test_aerial_boxes(real_data, tmp_path, root):
    S = load_scenes(root / "data_recipes" / "scenes" / "aerial_boxes.yaml", root=real_data / "aerial_boxes" / "data" / "test")
    assert len(S) == 43
    d = json.loads((real_data / "aerial_boxes/data/test/annotations-test_40.json").read_text())
    n, names = 0, {c["id"]: c["name"] for c in d["categories"]}
    for s in S:
        with S.open(s.name, check=False) as r:
            b = r.boxes("objects")
        image = next(o for o in d["images"] if o["file_name"] == s.name + ".png")
        mine = [a for a in d["annotations"] if a["image_id"] == image["id"]]
        assert [S.targets["objects"].classes[int(c)] for c in b[:, 0]] == [names[a["category_id"]] for a in mine]
        want = np.array([a["bbox"] for a in mine]).reshape(-1, 4)
        np.testing.assert_allclose(b[:, 1:3] - b[:, 3:5] / 2, want[:, :2], atol=0.02)
        n += len(b)
    assert n == 3546


@pytest.mark.data
def test_neon_voc(real_data):
    "Tree crowns of a real VOC file, on its image"
    file = next((real_data / "neon_rgb_chm" / "annotations").glob("*.xml"))
    image = real_data / "neon_rgb_chm" / "evaluation" / "RGB" / f"{file.stem}.tif"
    assert box_format(file) == "voc"
    S = load_scenes(dict(anchor="rgb", modalities=dict(rgb=dict(preset="rgb", gsd=0.1)), targets=dict(o=dict(kind="boxes", classes=["Tree"])),
                         scenes=[dict(name="a", rasters=dict(rgb=str(image)), targets=dict(o=str(file)))]))  # fmt: skip
    with S.open(0) as r:
        b = r.boxes("o")
        assert len(b) == file.read_text().count("<object>") > 3 and (b[:, 1:3] > 0).all() and (b[:, 1:3] < [r.width, r.height]).all()
        assert len(cut(b, 0, 0, (200, 200), False)) < len(b)
