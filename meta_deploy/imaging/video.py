"""Videos: frames in, RGB uint8 (H, W, 3) and upright, with their numbers and times; and MP4 out.

Knows files and their formats; must not know bundles or models. PyAV reads and writes them, not OpenCV: it
tells of times, rotation and damage, keeps odd and variable rates exactly, takes file objects (so that no
name is a URL or a pattern), always decodes AV1, and writes H.264, which browsers play. OpenCV's wheels do
none of this; the price is a wheel of 36 MB.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np

from meta_deploy.errors import ImageError
from meta_deploy.imaging.formats import HEAD, described

if TYPE_CHECKING:
    from av import VideoFrame

# Containers that hold the video itself: none that names other files (playlists, concat, image sequences).
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,m4v,h264,hevc,mxf,ivf,mjpeg,webm"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
_USUAL_RATE = Fraction(25)
_TICKS = 90_000  # a second, MPEG's own
_MOST_TICKS = 10_000_000
_LARGEST_EDGE = 16384  # of x264
# Without B-frames, for which MP4 would need decoding times that a variable rate does not have.
_PRESET = {"preset": "veryfast", "crf": "20", "bf": "0"}
_BOXES = frozenset(b"ftyp moov mdat free skip wide moof mfra sidx styp uuid meta udta pnot emsg prft".split())
_EBML = (b"\x1aE\xdf\xa3", b"\x18S\x80\x67")  # the header, the segment
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273


@dataclass(frozen=True)
class TimedFrame:
    """A frame: `image` RGB uint8 (H, W, 3); `index` its number in the file; `time` seconds from the first.

    `duration` is the seconds that it is shown, where the file says so.
    """

    image: np.ndarray
    index: int
    time: Fraction
    duration: Fraction | None


class Video:
    """A video file, whose frames come one at a time. A context manager.

    `fps` is its mean rate and `count` its number of frames as it claims, 0 where it does not say. `warning`
    is a sentence on what its pixels are, or None.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises ImageError when the file is missing or cannot be decoded."""
        self.path = Path(path)
        self.name = f"'{self.path}'"
        self._stream = _open(self.path, self.name)
        try:
            self._container, self._video = self._demuxer()
        except BaseException:
            self._stream.close()
            raise
        self.fps = float(self._video.average_rate or self._video.guessed_rate or _USUAL_RATE)
        self.count = self._count()
        self.warning = self._hdr()

    def _demuxer(self) -> tuple[Any, Any]:
        import av

        av.logging.set_level(None)
        head = self._stream.read(HEAD)
        self._stream.seek(0)
        try:
            # A file object: its name cannot be taken for a protocol or a pattern of names.
            container = av.open(_Nameless(self._stream), options=_OPTIONS, metadata_errors="ignore")
        except (av.FFmpegError, ValueError, EOFError) as error:
            raise ImageError(self._unreadable(head)) from error
        try:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise ImageError(f"{self.name} holds no video, only sound or text; give a video")
            if streams[0].codec_context is None:
                raise ImageError(
                    f"{self.name} holds a video in a codec {_codec(container)}that no decoder is there for; "
                    "convert it to H.264 or AV1 first"
                )
            streams[0].thread_type = "AUTO"
            return container, streams[0]
        except BaseException:
            container.close()
            raise

    def _unreadable(self, head: bytes) -> str:
        what = described(head)
        missing = _missing(self._stream)
        if missing:
            return f"{self.name} is cut short ({missing}); get the file again"
        if what and "video" not in what:
            kind, _, remedy = what.partition("; ")
            return f"{self.name} is {kind}, not a video; {remedy}"
        return f"{self.name} is not a video that can be read; give an MP4, AVI, MKV or WebM file"

    def _count(self) -> int:
        if self._video.frames:
            return self._video.frames
        seconds = (self._container.duration or 0) / 1_000_000
        return round(seconds * self.fps)

    def _hdr(self) -> str | None:
        transfer = _HDR.get(int(getattr(self._video.codec_context, "color_trc", 0) or 0))
        if transfer is None:
            return None
        return f"{self.name} is HDR ({transfer}), which is not mapped to usual brightness; convert it first"

    def __iter__(self) -> Iterator[TimedFrame]:
        """Frames in the order in which they are shown.

        Raises:
            ImageError: there is not a single one; or, after the last, some are missing or damaged.
        """
        given = damaged = 0
        reading = _Reading(self._container, self._video)
        for frame in reading:
            given += 1
            damaged += bool(frame.is_corrupt)
            yield reading.image(frame)
        if given == 0:
            raise ImageError(f"{self.name} holds no frame that can be read; get the file again")
        if problem := self._problem(reading, given, damaged):
            raise ImageError(f"{problem}; get the file again")

    def _problem(self, reading: _Reading, given: int, damaged: int) -> str | None:
        """What is wrong with a file of which `given` frames came out, `damaged` of them with faults."""
        end, promised = reading.end, self._promised()
        total = max(self.count, given + reading.failed)
        if cut := _missing(self._stream):
            why = f"it is cut short ({cut})"
        elif promised is not None and promised - end > max(0.5, promised / 20):
            why = f"it breaks off at {end:.2f} s of {promised:.2f} s"
        elif reading.failed or (damaged and total > given):
            why = "others are damaged"
        elif damaged:
            return f"{self.name} has frames that are damaged, {damaged} of {given}"
        else:
            return None
        return f"{given} of {total} frames of {self.name} could be read: {why}"

    def _promised(self) -> float | None:
        """The seconds that the video lasts as the file says, where it does say so of the video alone."""
        video, container = self._video, self._container
        if video.duration and video.time_base:
            return float(video.duration * video.time_base)
        if container.duration and len(container.streams) == 1:
            return container.duration / 1_000_000
        return None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()
        self._stream.close()


class _Reading:
    """Decodes a stream; numbers frames by the times of all the packets, so that lost ones are counted."""

    def __init__(self, container: Any, stream: Any):
        self.failed = 0
        self._container = container
        self._stream = stream
        self._ahead: list[int] = []  # times of the packets whose frames have not come out yet
        self._next = 0
        self._begins = (stream.start_time or 0) * Fraction(stream.time_base or 1)
        self._start: Fraction | None = None
        self._last = Fraction(-1)
        self.end = 0.0  # seconds from the stream's start, which may be lost, to the last frame's end

    def __iter__(self) -> Iterator[VideoFrame]:
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, EOFError):  # the container breaks off here
                packet = None
            if packet is not None and packet.pts is not None and not packet.is_discard:
                heapq.heappush(self._ahead, packet.pts)
            try:
                yield from self._stream.decode(packet)
            except EOFError:
                return
            except av.FFmpegError:
                self.failed += 1
            if packet is None:
                return

    def image(self, frame: VideoFrame) -> TimedFrame:
        """A decoded frame in RGB, turned as the file says, with its number and time."""
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        step = 1 / (self._stream.average_rate or self._stream.guessed_rate or _USUAL_RATE)
        if frame.pts is None or frame.time_base is None:
            index, time = self._next, self._last + step if self._last >= 0 else Fraction(0)
        else:
            index = self._number(frame.pts)
            at = frame.pts * frame.time_base
            self._start = at if self._start is None else self._start
            time = at - self._start
        if time <= self._last:
            time = self._last + step
        self._next, self._last = index + 1, time
        duration = frame.duration * frame.time_base if frame.duration and frame.time_base else None
        lost = self._start - self._begins if self._start is not None else Fraction(0)
        self.end = float(lost + time + (duration or step))
        return TimedFrame(np.ascontiguousarray(pixels), index, time, duration)

    def _number(self, pts: int) -> int:
        """The packets shown before, which have all been seen when a frame comes out."""
        earlier = 0
        while self._ahead and self._ahead[0] < pts:
            heapq.heappop(self._ahead)
            earlier += 1
        if self._ahead and self._ahead[0] == pts:
            heapq.heappop(self._ahead)
        return self._next + earlier


class _Nameless:
    """A binary file as libav reads it, without the name, which need not be text."""

    def __init__(self, stream: BinaryIO):
        self.read = stream.read
        self.seek = stream.seek
        self.tell = stream.tell


def _open(path: Path, name: str) -> BinaryIO:
    try:
        if not os.path.isfile(path):
            raise ImageError(f"there is no file {name}; check the path")
        stream = path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {name}: {reason}; check the path and its permissions") from error
    if os.fstat(stream.fileno()).st_size == 0:
        stream.close()
        raise ImageError(f"{name} is empty (0 bytes); get the file again")
    return stream


def _codec(container: Any) -> str:
    """The codec that has no decoder, as libav's summary names it, with a space after; empty: it does not."""
    import av

    with av.logging.Capture():  # the summary goes by way of the log
        av.logging.set_level(av.logging.INFO)
        summary = container.dumps_format()
        av.logging.set_level(None)
    found = re.search(r"Video: (\w+)(?: \((.{1,4}) / 0x)?", summary)
    name = (found[1] if found[1] not in ("none", "unknown") else found[2]) if found else None
    return f"'{name}' " if name else ""


def _missing(stream: BinaryIO) -> str | None:
    """What lacks of a file whose outermost parts (MP4 boxes, RIFF chunks, EBML elements) tell their size."""
    size = os.fstat(stream.fileno()).st_size
    at, index, media = 0, False, False
    while at < size:
        stream.seek(at)
        head = stream.read(16)
        length = _part(head, at)
        if length is None:
            return None
        kind = head[4:8]
        index |= kind == b"moov"
        media |= kind == b"mdat"
        if length == 0:  # to the end, whatever that is
            break
        if at + length > size + 1:  # a RIFF's last padding may be left out
            return f"{at + length - size} bytes are missing at the end"
        at += length
    return "its index, the moov box, is missing" if media and not index else None


def _part(head: bytes, at: int) -> int | None:
    """Bytes of the part that starts so; 0: up to the end; None: of no such container."""
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        return 0 if length in (0, 0xFFFFFFFF) else 8 + length + length % 2
    if head[:4] in _EBML:
        width = 9 - head[4].bit_length() if len(head) > 4 else 9
        if width > 8 or len(head) < 4 + width:
            return 0
        length = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        return 0 if length == (1 << 7 * width) - 1 else 4 + width + length
    if head[4:8] not in _BOXES:
        return None
    length = int.from_bytes(head[:4], "big")
    return int.from_bytes(head[8:16], "big") if length == 1 else length


class VideoWriter:
    """An H.264 MP4, written frame by frame, each at its own time."""

    def __init__(self, stream: IO[bytes], fps: float):
        """`stream` can be written and sought in. `fps` is the mean rate, for players that ask."""
        import av

        av.logging.set_level(None)
        self._container = av.open(stream, "w", format="mp4")
        # One frame a day at least, or x264 refuses; the times are the frames' own.
        self._fps = max(Fraction(fps).limit_denominator(100_000), Fraction(1, 86_400))
        self._encoder: Any = None
        self._base = Fraction(1, _TICKS)
        self._last = -1
        self._durations: dict[int, int] = {}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What libav says of a failed write, as the OSError that it was."""
        import av

        try:
            yield
        except av.FFmpegError as error:
            reason = error.__cause__ or error.__context__ or error
            raise reason if isinstance(reason, OSError) else OSError(str(error)) from error

    def write(self, image: np.ndarray, time: Fraction, duration: Fraction | None = None) -> None:
        """Append an RGB uint8 frame (H, W, 3) that is shown `time` seconds from the start.

        Every frame gets the size of the first. An odd edge gets one more row or column, since H.264 has none.

        Raises:
            OSError: the disk is full.
        """
        from av import VideoFrame

        if self._encoder is None:
            self._start(image, duration or 1 / self._fps)
        frame = VideoFrame.from_ndarray(self._fitted(image), "rgb24")
        frame.time_base = self._base
        frame.pts = self._last = max(round(time / self._base), self._last + 1)
        step = duration if duration else 1 / self._fps
        self._durations[frame.pts] = max(1, round(step / self._base))
        with self._told():
            self._mux(self._encoder.encode(frame))

    def _start(self, image: np.ndarray, step: Fraction) -> None:
        # Ticks that give the frames' times exactly, if a common rate's and milliseconds have such.
        # A frame of MP4 takes at most 2**31 of them, so that a time lapse gets longer ones.
        usual = max(1, round(_TICKS * min(self._fps, Fraction(1))))
        ticks = math.lcm(usual, step.denominator)
        self._base = Fraction(1, ticks if ticks < _MOST_TICKS else max(step.denominator, 1000))
        shrink = max(1, -(-max(image.shape[:2]) // _LARGEST_EDGE))
        height, width = (max(1, edge // shrink) for edge in image.shape[:2])
        self._shown = height, width
        self._encoder = self._container.add_stream("libx264", rate=self._fps, options=_PRESET)
        self._encoder.width, self._encoder.height = width + width % 2, height + height % 2
        self._encoder.pix_fmt = "yuv420p"
        self._encoder.codec_context.time_base = self._base

    def _fitted(self, image: np.ndarray) -> np.ndarray:
        import cv2

        height, width = self._shown
        if image.shape[:2] != self._shown:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        if height % 2 or width % 2:
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(image)

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._container.mux(packet)

    def close(self) -> None:
        """Write the rest and the index. Raises OSError: the disk is full."""
        with self._told():
            try:
                if self._encoder is not None:
                    self._mux(self._encoder.encode(None))
            finally:
                self._container.close()
