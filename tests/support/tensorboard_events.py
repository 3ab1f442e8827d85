"""What TensorBoard shows of a folder of event files, read by the rules of its format.

A file is a list of records: length as a little-endian 64-bit number, its checksum, a protobuf `Event`, its checksum.
"""

import struct
from pathlib import Path

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog


def events(file: Path) -> list[Event]:
    data, place, found = file.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 12 + length + 4
    return found


def shown(folder: Path) -> dict[tuple[int, str], np.float32]:
    """`{(step, name): value}`; fails if a step has a name twice.

    A session that starts at a step makes TensorBoard forget what it has read of that step and later ones.
    """
    values: dict[tuple[int, str], np.float32] = {}
    for file in sorted(folder.iterdir()):
        for event in events(file):
            if event.session_log.status == SessionLog.START:
                values = {key: value for key, value in values.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in values
                values[event.step, value.tag] = np.float32(value.simple_value)
    return values
