"""The C++ extension: addresses and sizes are integers, 0 is a null pointer. See csrc/include/api.h."""

def reduce_panel(
    term: int,
    scores: int,
    rows: int,
    cols: int,
    stride: int,
    params: int,
    exclude: int,
    exclude_count: int,
    first_column: int,
    threads: int,
    row_reference: int,
    row_sum: int,
    col_reference: int,
    col_sum: int,
    /,
) -> None: ...
def weight_panel(
    term: int,
    scores: int,
    rows: int,
    cols: int,
    stride: int,
    params: int,
    exclude: int,
    exclude_count: int,
    first_column: int,
    threads: int,
    row_reference: int,
    row_sum: int,
    col_reference: int,
    col_sum: int,
    row_normalizer: int,
    row_gain: int,
    col_normalizer: int,
    col_gain: int,
    weights: int,
    weights_dtype: int,
    weights_stride: int,
    dparams: int,
    /,
) -> None: ...
def exp_array(x: int, out: int, n: int, /) -> None: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str, /) -> None: ...
