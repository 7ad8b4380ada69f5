"""What people read: Markdown and the page, of a report by hand; the page also in a browser, where one is."""

import base64
import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from msgspec.structs import replace

from meta_deploy.bundle.manifest import PassRow
from meta_deploy.report import plots, words
from meta_deploy.report.markdown import to_markdown
from meta_deploy.report.page import TOP, broken, slowest, to_html
from meta_deploy.report.profile import by_module, sum_up
from meta_deploy.report.schema import (
    Accuracy,
    Disagreement,
    Entry,
    Latency,
    LivePeak,
    LiveTensor,
    Machine,
    NodeRow,
    Profile,
    Ratio,
    Report,
    Roofline,
    Settings,
    Spread,
)
from meta_deploy.report.trace import to_trace

JPEG = b"\xff\xd8 not looked at"
EVIL = "<script>alert(1)</script>|$x_1$"


def spread(median):
    return Spread(median=median, p5=0.9 * median, p90=1.2 * median, p99=1.5 * median)


def ratio(value, low, high, verdict):
    return Ratio(value=value, low=low, high=high, verdict=verdict)


def latency(total, found=None):
    parts = {"pre": spread(1.0), "model": spread(total - 3), "post": spread(2.0), "total": spread(total)}
    return Latency(rounds=40, total_ratio=found, model_ratio=found, drift=1.0, **parts)


def node(name, op, op_class, ms, bytes_=None, flops=None, bound=None):
    return NodeRow(
        name=name,
        op=op,
        op_class=op_class,
        calls=1.0,
        ms=ms,
        inputs=("float 1x3x8x8",),
        outputs=("float 1x4x8x8",),
        bytes_read=bytes_,
        bytes_written=bytes_,
        flops=flops,
        intensity=flops / (2 * bytes_) if flops and bytes_ else None,
        bound=bound,
        share_of_roof=0.5 if bound else None,
    )


def pass_row(name, nodes_before, nodes_after, before, after, exact=False):
    """A pass that leaves the 7 moves; bytes in MB."""
    return PassRow(
        name=name,
        changes=1,
        nodes_before=nodes_before,
        nodes_after=nodes_after,
        moves_before=7,
        moves_after=7,
        bytes_before=int(before * 1e6),
        bytes_after=int(after * 1e6),
        bytes_exact=exact,
    )


@pytest.fixture(scope="module")
def made():
    nodes = [
        node("conv", "Conv", "convolution", 6.0, 4000, 9_000_000, "arithmetic"),
        node("move", "Transpose", "data movement", 3.0, 8000, 0, "memory"),
        node(f"odd {EVIL}", "Loop", "other", 0.5),
    ]
    peak = LivePeak(bytes=12_000, node="conv", tensors=(LiveTensor(name="t", made_by="move", bytes=12_000),))
    profile = Profile(
        by="a profiler", runs=5, ms=10.0, classes=sum_up(nodes, 10.0), nodes=tuple(nodes), live_peak=peak
    )
    entry = Entry(
        name="first", path="a", kind="bundle", backend="onnxruntime", latency=latency(20.0), profile=profile
    )
    entry = replace(
        entry,
        files={"model.onnx": 17_300_000},
        peak_memory_mb=260.0,
        runs_on="ONNX Runtime 1",
        precision="fp32",
    )
    passes = (
        pass_row("clean-up", 4000, 1000, 2.0, 1.5, True),
        pass_row("collapse-chains", 1000, 900, 1.5, 1.0),
    )
    agreed = Accuracy(against="the first entry", images=8, box_ap=0.987, mask_ap=0.95)
    faster = latency(10.0, ratio(0.5, 0.45, 0.55, "faster"))
    same = latency(20.2, ratio(1.01, 0.98, 1.03, "no difference"))
    return Report(
        date="2026-01-01 00:00 UTC",
        command="meta-report a b",
        machine=Machine(
            cpu="A CPU",
            instruction_sets=("avx2",),
            cpus=2,
            memory_gb=8.0,
            governor=None,
            system="Linux",
            versions={"numpy": "2"},
            load=0.1,
        ),
        settings=Settings(images=("one.jpg", "two.jpg"), warm_up=3, runs=40, threads=2),
        roofline=Roofline(bandwidth_gb_s=10.0, peak_gflop_s=50.0),
        disagreements=(
            Disagreement(
                image=f"in/{EVIL}.jpg", values={"second": 0.25}, overlays={"first": JPEG, "second": JPEG}
            ),
        ),
        entries=(
            replace(entry, passes=passes),
            replace(entry, name="second", latency=faster, accuracy=agreed),
            replace(entry, name=EVIL, latency=same, profile=None),
            Entry(name="broken", path="x", kind=None, backend="auto", error="there is no 'x'"),
        ),
    )


@pytest.fixture(scope="module")
def page(made):
    return to_html(made)


def test_verdicts_say_what_the_intervals_say(made):
    assert words.verdicts(made) == [
        "second is 2.00 times as fast as first; agreement with its results: box AP 0.987, mask AP 0.950.",
        f"{EVIL} takes as long as first, to within 3.0 %.",
        "broken was not measured: there is no 'x'.",
    ]


def test_verdicts_tell_what_was_scored_against_annotations(made):
    first, second, *_ = made.entries
    scored = [
        replace(entry, accuracy=Accuracy(against="annotations", images=2, box_ap=box, mask_ap=mask))
        for entry, box, mask in ((first, 0.5, None), (second, 0.25, 0.1))
    ]
    assert words.verdicts(replace(made, entries=tuple(scored))) == [
        "second is 2.00 times as fast as first; box AP 0.250 against 0.500."
    ]


def test_a_title_names_what_runs_and_of_many_the_first(made):
    assert words.title(made) == f"first, second, {EVIL}"
    assert words.title(replace(made, entries=made.entries * 2)) == "first and 5 others"


def test_numbers_are_short():
    assert [words.ms(x) for x in (0.01234, 1.234, 12.34, 1234.5)] == ["0.012", "1.23", "12.3", "1,234"]
    assert [words.size(x) for x in (0, 999, 1500, 17_300_000, 2.5e9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "17.3 MB",
        "2.50 GB",
    ]
    assert [words.count(x) for x in (0, 999, 9_000_000, 11.2e9)] == ["0", "999", "9.0 M", "11.2 G"]


def test_markdown_has_a_row_for_each_entry_and_no_more_columns_than_its_head(made):
    text = to_markdown(replace(made, disturbances=("Other work was running.",)))
    assert text.index("Disturbed") < text.index("| first |")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "| second | 10.0 |" in text
    assert "there is no 'x'" in text
    assert "| convolution | 6.00 (60 %) | 6.00 (60 %) |" in text
    assert "<script" not in text


class Tags(html.parser.HTMLParser):
    """What a page refers to, and whether what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.references, self.open, self.count = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]
        if tag not in ("meta", "link", "br", "wbr", "input", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_outside(page):
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert all(reference.startswith(("#", "data:")) for reference in tags.references)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", page)
    assert tags.count["svg"] == 5  # latency, memory, classes, and a roofline of each that has a profile


def test_pictures_stand_side_by_side_in_the_page_itself(page):
    assert page.count(f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}") == 2
    assert page.count("25.0 % differ") == 1  # the first entry is what is differed from


def test_passes_are_told_before_and_after(made, page):
    for text in (page, to_markdown(made)):
        assert "nodes 4,000 → 900, transposes and reshapes 7, bytes moved at least 2.0 MB → 1.0 MB" in text
        assert "1,000 → 900" in text  # the second pass
    assert page.count("<td>collapse-chains</td>") == 1


def test_modules_are_a_column_and_a_table(made):
    nodes = [replace(node(f"net.{m}/n", "Add", "element-wise", 2.0), module=f"net.{m}") for m in "ab"]
    rows = by_module(nodes, 10.0)
    profile = replace(made.entries[0].profile, nodes=tuple(nodes), modules=rows)
    told = replace(made, entries=(replace(made.entries[0], profile=profile), *made.entries[1:]))
    text = to_markdown(told)
    assert "| `net` | 4.00 (40 %) |" in text
    assert "| `net.b` | 2.00 (20 %) |" in text
    page = to_html(told)
    assert '<td><span>n</span></td><td class="left">net.a</td>' in page
    assert "3 modules that take at least 1 %" in page


def test_names_may_be_broken_at_their_dots_and_stay_text():
    assert broken("a.b_1/<c>") == "<span>a.<wbr>b_<wbr>1/&lt;c&gt;</span>"


def test_names_are_text_on_the_page(page):
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") > 2


def test_plots_take_their_colours_from_the_page(page):
    svg = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    colours = {colour.lower() for colour in re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", "".join(svg))}
    assert not colours
    assert "var(--ink)" in svg[0]
    assert "<text" in svg[0]  # text and not outlines, so that it can be found


def test_dots_are_circles_where_matplotlib_had_them(made):
    first = made.entries[0]
    nodes = tuple(node(f"n{i}", "Conv", "convolution", ms, 4000, 10**i) for i, ms in ((6, 6.0), (7, 0.1)))
    svg = plots.roofline(made, replace(first, profile=replace(first.profile, nodes=nodes)))
    box = re.search(r'<clipPath id="\w+">\s*<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', svg)
    left, top, width, height = map(float, box.groups())
    (x6, y6, r6), (x7, y7, r7) = (
        tuple(map(float, dot)) for dot in re.findall(r'<circle cx="(.*?)" cy="(.*?)" r="(.*?)"', svg)
    )
    assert left < x6 < x7 < left + width  # more FLOPs a byte
    assert top < y7 < y6 < top + height  # and more a second
    assert r6**2 / r7**2 == pytest.approx((6 + 300 * 0.6) / (6 + 300 * 0.01), rel=0.02)  # areas are times


def test_accuracy_by_annotations_is_plotted_against_latency(made):
    known = replace(made, settings=replace(made.settings, annotations="truth.json"))
    truth = Accuracy(against="annotations", images=2, box_ap=0.4)
    entries = [replace(entry, accuracy=truth) if entry.latency else entry for entry in made.entries]
    assert "box AP" in plots.trade(replace(known, entries=tuple(entries)))
    assert plots.trade(made) is None


def test_a_page_of_many_nodes_lists_the_slowest(made):
    first = made.entries[0]
    nodes = tuple(node(f"n{i}", "Add", "element-wise", 0.001 * i) for i in range(TOP + 50))
    rows = slowest(replace(first, profile=replace(first.profile, nodes=nodes)))
    assert len(rows) == TOP
    assert (rows[0].name, rows[-1].name) == (f"n{TOP + 49}", "n50")


def test_a_trace_has_a_process_for_each_entry_and_its_nodes_end_to_end(made):
    events = json.loads(to_trace(made))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(names.values()) == ["first", "second", EVIL, "broken: there is no 'x'"]
    spans = {pid: [e for e in events if e["ph"] == "X" and e["pid"] == pid] for pid in names}
    assert [len(found) for found in spans.values()] == [4, 4, 0, 0]
    ends = 0.0
    for span in spans[1]:
        assert span["ts"] == pytest.approx(ends)
        ends += span["dur"]
    assert ends == pytest.approx(10_000)  # microseconds of the run, what is between nodes included
    conv = spans[1][0]
    assert (conv["name"], conv["cat"], conv["dur"]) == ("conv", "convolution", 6000)
    assert (conv["args"]["op"], conv["args"]["flops"]) == ("Conv", 9_000_000)


CHECKS = """<script>
const table = document.querySelectorAll("table[data-sortable]")[0];
const buttons = table.querySelectorAll("th button");
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[0].firstChild.textContent).join();
buttons[1].click(); const down = column();
buttons[1].click(); const up = column();
const input = document.querySelector("input[data-search]");
input.value = "transpose data"; input.dispatchEvent(new Event("input"));
const shown = [...input.closest("details").querySelectorAll("tbody tr")].filter((row) => !row.hidden).length;
const drawn = [...document.querySelectorAll("svg")].every((svg) => svg.getBoundingClientRect().height > 50);
const fits = document.documentElement.scrollWidth <= innerWidth;
const found = JSON.stringify({down, up, shown, drawn, fits}).replaceAll("<", "\\u003c");
document.body.innerHTML = "<pre>" + found + "</pre>";
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser_tables_sort_and_search_and_plots_are_drawn(page, tmp_path, width):
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", CHECKS + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options = ["--enable-logging=stderr", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, *options, file.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", done.stdout)[1]))
    assert found["up"] == f"second,first,{EVIL},broken"
    assert found["down"] == f"broken,{EVIL},first,second"
    assert (found["shown"], found["drawn"], found["fits"]) == (1, True, True)
    assert "CONSOLE" not in done.stderr
