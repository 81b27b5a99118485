"""nbdev's processing of the notebooks for the documentation: run by docs.py, two processes, only what changed.

Like `nbdev_proc_nbs`, but without Quarto (which that fetches), and without its `show_doc` cells: docs_symbols.py reads
the docments from the source. nbdev would run every cell that holds an import, tests with all their needs among them.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbdev.processors as processors
from nbdev.serve_drv import exec_nb


class Processors(processors.FilterDefaults):
    "nbdev's processors but for those that run code."

    def base_procs(self):
        run = processors.add_show_docs, processors.exec_show_docs, processors.clean_show_doc
        return [p for p in super().base_procs() if p not in run]


def process(job):
    "One notebook."
    source, out = job
    os.environ["IN_TEST"] = "1"
    exec_nb(source, out, Processors)


def main(jobs):
    from docs_process import process  # by name: a notebook's shell takes the place of __main__

    todo = []
    library = max((p.stat().st_mtime for p in [*Path("rs_selfsup").rglob("*.py"), Path("settings.ini")]), default=0)
    for source, out in jobs:
        if not out.exists() or out.stat().st_mtime < max(source.stat().st_mtime, library):
            out.parent.mkdir(parents=True, exist_ok=True)
            todo.append((source, out))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for (source, _), done in [(job, pool.submit(process, job)) for job in todo]:
            try:
                done.result()
            except Exception as e:
                sys.exit(f"{source}: {e}\n  {type(e.__cause__).__name__}: {e.__cause__}")


if __name__ == "__main__":
    books = [Path(p) for p in sys.argv[2:]]
    main([(b, Path(sys.argv[1]) / b.relative_to("nbs")) for b in books])
