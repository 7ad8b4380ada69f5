"""What `meta-export --explain` prints: the places that passes declined, alike ones together."""

from meta_deploy.cli.export import explanation


def place(node, reason, op="Softmax"):
    return {"node": node, "op": op, "reason": reason}


ROWS = [
    {
        "name": "fuse-attention",
        "declined": [
            *(place(f"softmax_{i}", f"'add_{i}' (1, n*({i})) comes from Add 'mask_{i}'") for i in range(4)),
            place("softmax_9", "the scale is 0.0"),
        ],
    },
    {"name": "fold-scales", "declined": []},
    {"name": "move-linears", "declined": [place("matmul", "Pad 'pad' is in the way", "MatMul")]},
]


def test_reasons_that_differ_by_a_name_or_a_size_are_one_line():
    assert explanation(ROWS, "fuse-attention").splitlines() == [
        "fuse-attention left as they are:",
        "  4 Softmax (softmax_0, softmax_1, softmax_2, …): "
        "for the first, 'add_0' (1, n*(0)) comes from Add 'mask_0'",
        "  1 Softmax (softmax_9): the scale is 0.0",
    ]


def test_all_passes_that_have_something_to_say_are_told():
    heads = [line for line in explanation(ROWS, "all").splitlines() if not line.startswith(" ")]
    assert heads == ["fuse-attention left as they are:", "move-linears left as they are:"]


def test_a_pass_that_left_nothing_is_said_to_have_left_nothing():
    assert explanation(ROWS, "fold-scales").startswith("no pass left a place")
