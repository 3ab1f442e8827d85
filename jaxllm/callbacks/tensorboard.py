"""TensorBoard: the lines of metrics.jsonl as scalars of the same names."""

import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxllm.callbacks.base import CALLBACKS, Callback, CallbackConfig
from jaxllm.checkpoint.run_files import TENSORBOARD


class TensorBoardConfig(CallbackConfig):
    type: Literal["tensorboard"] = "tensorboard"

    def open(self, folder: Path, resumed_at: int | None) -> "TensorBoard":
        """Writes below `folder`."""
        return TensorBoard(folder / TENSORBOARD, resumed_at)


class TensorBoard(Callback):
    """Writes an event file into `folder`, which `tensorboard --logdir` shows while the run goes on.

    The file of a run that goes on tells TensorBoard to forget what a killed one wrote after `resumed_at`; all of it,
    if None.
    """

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        # Here, since importing it imports torch where that is, which takes seconds.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._protocol: tuple[Any, Any] = event_pb2, summary_pb2  # generated code without types
        self._checksum: Callable[[bytes], int] = masked_crc32c
        folder.mkdir(exist_ok=True)
        first = 0 if resumed_at is None else resumed_at + 1
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first}"
        self._file = (folder / name).open("wb", buffering=0)
        events, _ = self._protocol
        self._write(events.Event(wall_time=time.time(), file_version="brain.Event:2"))
        begin = events.SessionLog(status=events.SessionLog.START)
        self._write(events.Event(wall_time=time.time(), step=first, session_log=begin))

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values, and hands them to the operating system at once."""
        events, summaries = self._protocol
        scalars = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = summaries.Summary(value=scalars)
        self._write(events.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        # Not by tensorboardX's own writer: it waits for the disk after every record.
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        self._file.write(length + next(checksums) + data + next(checksums))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


CALLBACKS.add("tensorboard", TensorBoardConfig)
