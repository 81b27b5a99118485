"""Random tile reads from the candidate formats of the tile store, by 1, 2, 8 and 16 processes.

    python benchmarks/store_formats.py                     # about 3 minutes, 1.5 GB of temporary files
    python benchmarks/store_formats.py --tiles 200 --seconds .3 --workers 1 2
    python benchmarks/store_formats.py --build 5000 20000  # peak memory and tiles/s of a build, scenes of that side

Every process reads batches of 64 random tiles (4 bands of uint8, 224 px) for some seconds; files are in the page cache.
"""

import argparse
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")
SHAPE, BATCH = (4, 224, 224), 64


def picture(n, seed=0):
    "n tiles that compress about as imagery does."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:224, :224]
    for _ in range(n):
        a, b, c = rng.uniform(20, 90, 3)
        base = 128 + 50 * np.sin(x / a + c) * np.cos(y / b)
        yield np.clip(base + rng.normal(0, 5, SHAPE), 1, 255).astype(np.uint8)


def profile(**kw):
    return dict(driver="GTiff", count=4, height=224, width=224, dtype="uint8", photometric="MINISBLACK", alpha="NO") | kw


def write_all(root, n):
    "The same tiles in every format."
    import rasterio
    import zarr
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    from rs_selfsup.data.tiles import build_store

    side = int(n**0.5)
    geo = dict(crs="EPSG:32631", transform=from_origin(4e5, 5.4e6, 0.5, 0.5))
    npy = np.lib.format.open_memmap(root / "tiles.npy", "w+", np.uint8, (side * side, *SHAPE))
    z = zarr.open_group(root / "zarr", mode="w").create_array(
        "rgbn", shape=npy.shape, chunks=(1, *SHAPE), dtype="u1", compressors=None
    )
    (root / "tif").mkdir()
    big = profile(height=side * 224, width=side * 224, tiled=True, compress="deflate", **geo)
    with rasterio.open(root / "scene.tif", "w", **big) as f:
        for r in range(side):
            row = np.stack(list(picture(side, r)))
            f.write(np.concatenate(row, -1), window=Window(0, r * 224, side * 224, 224))
            npy[r * side : (r + 1) * side] = row
            z[r * side : (r + 1) * side] = row
            for c, t in enumerate(row):
                with rasterio.open(root / "tif" / f"{r * side + c}.tif", "w", **profile(**geo)) as one:
                    one.write(t)
    modality = dict(preset="rgbn", gsd=0.5)
    d = dict(anchor="rgbn", modalities=dict(rgbn=modality), scenes=[dict(name="a", rasters=dict(rgbn=str(root / "scene.tif")))])
    from rs_selfsup.data.rasters import load_scenes

    build_store(load_scenes(d), root / "store", progress=False, splits=(1, 0, 0))
    return side * side


def readers(root, n):
    "Format -> function that opens it -> function that reads a batch of tile numbers."
    side = int(n**0.5)

    def npy():
        a = np.load(root / "tiles.npy", mmap_mode="r")
        return lambda ids: a[ids]

    def mapped():
        import json

        meta = json.loads((root / "store" / "rgbn" / "zarr.json").read_text())
        k, maps = meta["chunk_grid"]["configuration"]["chunk_shape"][0], {}

        def chunk(c):
            if c not in maps:
                maps[c] = np.asarray(np.memmap(root / "store" / "rgbn" / f"c.{c}.0.0.0", np.uint8, "r", shape=(k, *SHAPE)))
            return maps[c]

        def read(ids):
            out = np.empty((len(ids), *SHAPE), np.uint8)
            for j, i in enumerate(ids.tolist()):
                out[j] = chunk(i // k)[i % k]
            return out

        return read

    def pread():
        import json

        meta, fds = json.loads((root / "store" / "rgbn" / "zarr.json").read_text()), {}
        k, size = meta["chunk_grid"]["configuration"]["chunk_shape"][0], int(np.prod(SHAPE))

        def read(ids):
            out = np.empty((len(ids), *SHAPE), np.uint8)
            for j, i in enumerate(ids.tolist()):
                c = i // k
                if c not in fds:
                    fds[c] = os.open(root / "store" / "rgbn" / f"c.{c}.0.0.0", os.O_RDONLY)
                os.preadv(fds[c], [out[j]], i % k * size)
            return out

        return read

    def ours():
        from rs_selfsup.data.tiles import TileStore

        return TileStore(root / "store").read

    def zarr_python():
        import zarr

        a = zarr.open_group(root / "zarr", mode="r")["rgbn"]
        return lambda ids: np.stack([a[i] for i in ids.tolist()])

    def tif_each():
        import rasterio

        def one(i):
            with rasterio.open(root / "tif" / f"{i}.tif") as f:
                return f.read()

        return lambda ids: np.stack([one(i) for i in ids.tolist()])

    def windows():
        import rasterio
        from rasterio.windows import Window

        f = rasterio.open(root / "scene.tif")
        return lambda ids: np.stack([f.read(window=Window(i % side * 224, i // side * 224, 224, 224)) for i in ids.tolist()])

    return {
        "memory-mapped npy": npy,
        "Zarr chunks, memory-mapped": mapped,
        "Zarr chunks, pread": pread,
        "Zarr chunks, memory-mapped, read ahead (TileStore)": ours,
        "Zarr, zarr-python": zarr_python,
        "one GeoTIFF per tile": tif_each,
        "windows of a tiled, deflated GeoTIFF": windows,
    }


def work(root, n, name, seconds, seed, start, out):
    read, rng, done = readers(root, n)[name](), np.random.default_rng(seed), 0
    read(rng.integers(0, n, 4))
    start.wait()
    t, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - t < seconds:
        read(rng.integers(0, n, BATCH))
        done += BATCH
    out.put((done, time.perf_counter() - t, time.process_time() - cpu))


def rate(root, n, name, workers, seconds, cpu=False):
    "Tiles per second of all processes together, or per second of CPU time."
    ctx = mp.get_context("spawn")
    start, out = ctx.Barrier(workers), ctx.Queue()
    procs = [ctx.Process(target=work, args=(root, n, name, seconds, s, start, out)) for s in range(workers)]
    for p in procs:
        p.start()
    got = [out.get() for _ in procs]
    for p in procs:
        p.join()
    return sum(d for d, _, _ in got) / sum(c for _, _, c in got) if cpu else sum(d / w for d, w, _ in got)


def build_memory(side, folder=None, workers=1):
    "Build a store from one scene of `side` px in a process of its own: (peak of that process in MiB, tiles/s)."
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        strip = np.random.default_rng(0).integers(1, 255, (4, 512, side), dtype=np.uint8) & 0xF8
        kw = profile(height=side, width=side, tiled=True, blockxsize=512, blockysize=512, compress="deflate", zlevel=1, BIGTIFF="YES")
        with rasterio.open(root / "s.tif", "w", crs="EPSG:32631", transform=from_origin(4e5, 5.4e6, 0.5, 0.5), **kw) as f:
            for r in range(0, side, 512):
                f.write(strip[:, : min(512, side - r)], window=Window(0, r, side, min(512, side - r)))
        code = (
            "import sys, time; from rs_selfsup.data.tiles import build_store; from rs_selfsup.data.rasters import load_scenes\n"
            "d = dict(anchor='rgbn', modalities=dict(rgbn=dict(preset='rgbn', gsd=.5)), scenes=[dict(name='a', rasters=dict(rgbn=sys.argv[1]))])\n"
            "t = time.perf_counter(); s = build_store(load_scenes(d), sys.argv[2], progress=False, workers=int(sys.argv[3]))\n"
            "peak = next(int(n.split()[1]) for n in open('/proc/self/status') if n.startswith('VmHWM'))\n"  # ru_maxrss begins at the parent's
            "print(peak/1024, s.report['candidates']/(time.perf_counter() - t))"
        )
        args = [sys.executable, "-c", code, str(root / "s.tif"), str(root / "out"), str(workers)]
        mib, speed = subprocess.run(args, check=True, capture_output=True, text=True).stdout.split()
        return float(mib), float(speed)
    finally:
        shutil.rmtree(root)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiles", type=int, default=1024, help="tiles in each format")
    p.add_argument("--seconds", type=float, default=2.0, help="per measurement and process")
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8, 16])
    p.add_argument("--repeats", type=int, default=3, help="the best is printed: other work on the machine only ever slows down")
    p.add_argument("--cpu", action="store_true", help="count CPU time instead of the clock: for a machine that is shared")
    p.add_argument("--folder", help="where temporary files go")
    p.add_argument("--build", type=int, nargs="+", metavar="SIDE", help="instead: peak memory of builds")
    a = p.parse_args()
    if a.build:
        for side in a.build:
            print("{}: peak {:.0f} MiB, {:.0f} tiles/s".format(side, *build_memory(side, a.folder)), flush=True)
        return
    root = Path(tempfile.mkdtemp(dir=a.folder))
    try:
        n = write_all(root, a.tiles)
        print(f"{n} tiles of {SHAPE}, tiles/s{' of CPU time' * a.cpu}\n\n| format | " + " | ".join(f"{w} proc." for w in a.workers) + " |")
        print("|---" * (len(a.workers) + 1) + "|")
        for name in readers(root, n):
            got = [max(rate(root, n, name, w, a.seconds, a.cpu) for _ in range(a.repeats)) for w in a.workers]
            print(f"| {name} | " + " | ".join(f"{g:,.0f}" for g in got) + " |", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
