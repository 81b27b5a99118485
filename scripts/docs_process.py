"""nbdev's processing of the notebooks for the documentation: run by docs.py, two processes, only what changed.

Like `nbdev_proc_nbs`, but without Quarto (which that fetches), and `show_doc` looks at the exported module. nbdev would run
the notebook's exported cells and every cell that holds an import, tests with all their needs among them.
"""

import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbdev.processors as processors
from nbdev.serve_drv import exec_nb


def calls_show_doc(cell):
    "The only cells to run."
    code = cell.cell_type == "code" and cell.source and processors.cell_lang(cell) == "python"
    return bool(code and processors._show_docs(cell.parsed_() or []))


class FromModule(processors.exec_show_docs):
    "`show_doc` with the names of the exported module."

    def begin(self):
        super().begin()
        if module := processors._default_exp(self.nb):
            package = processors.get_config().lib_name
            self.k.user_ns.update(vars(importlib.import_module(f"{package}.{module}")))
            self.k.run_cell("from nbdev.showdoc import show_doc")


class Processors(processors.FilterDefaults):
    "nbdev's processors, with ours in place of the one that runs cells."

    def base_procs(self):
        return [FromModule if p is processors.exec_show_docs else p for p in super().base_procs()]


processors._do_eval = calls_show_doc


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
