"""Open a table of activations and its sidecar, and print what is in them.

    python examples/read_activations.py                                       # the demo's held-out table
    python examples/read_activations.py runs/demo/extract/base.parquet --rows 5

The vectors are read through a memory map: a table of any size opens at once. The first reader puts an uncompressed copy
beside the table for that, a hidden file that may be deleted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nla_megatron.contract import columns
from nla_megatron.contract.sidecar import DatasetSidecar, read_dataset_sidecar
from nla_megatron.contract.tables import Table


def show_sidecar(sidecar: DatasetSidecar) -> None:
    """Where the activations come from, and what is recorded of the prompts."""
    source = sidecar.extraction
    print(f"stage         {sidecar.stage} ({sidecar.dataset_id})")
    print(f"model         {source.base_model}")
    print(f"activations   after block {source.layer_index}, width {source.d_model}, norm {source.norm}")
    documents = f"{source.corpus_slice.length} documents, {source.positions_per_doc} positions each"
    print(f"corpus        {source.corpus}, {documents}")
    if sidecar.tokens is not None and sidecar.prompt_templates is not None:
        print(f"marker        {sidecar.tokens.injection_char} (id {sidecar.tokens.injection_token_id})")
        print(f"AV prompt     {sidecar.prompt_templates.av!r}")
        print(f"AR prompt     {sidecar.prompt_templates.ar!r}")
    if sidecar.injection is not None:
        print(f"injection     {sidecar.injection.method} at the output of block {sidecar.injection.layer}")
    if sidecar.api_summaries is not None:
        print(f"explained by  {sidecar.api_summaries.model}")


def show_table(table: Table, n_shown: int) -> None:
    """Sizes, the spread of the norms, and the first rows."""
    documents, positions = table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS)
    norms_N = np.linalg.norm(table.vectors(range(table.n_rows)), axis=1)
    quartiles = ", ".join(f"{value:.3g}" for value in np.percentile(norms_N, [0, 25, 50, 75, 100]))
    print(f"\nrows          {table.n_rows} of {len(set(documents))} documents")
    print(f"norms         {quartiles} (least, quartiles, largest; the vectors are raw)")
    texts = table.column(columns.TEXT)
    for row, vector_D in enumerate(table.vectors(range(min(n_shown, table.n_rows)))):
        print(f"\n{documents[row]}, token {positions[row]}: … {texts[row][-70:]!r}")
        print(f"  {np.array2string(vector_D[:6], precision=3)} and {table.d_model - 6} more numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", default=Path("runs/demo/build/held_out.parquet"))
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show")
    chosen = parser.parse_args()

    sidecar = read_dataset_sidecar(chosen.table)
    show_sidecar(sidecar)
    print(f"columns       {', '.join(pq.read_schema(chosen.table).names)}")
    # A table with explanations is a base table with one column more, and its sidecar calls it one.
    show_table(Table.open(chosen.table, sidecar.stage), chosen.rows)


if __name__ == "__main__":
    main()
