"""The parameters of a kernel, as its cubin (an ELF file) declares them to the driver."""

import struct

_KERNEL_PARAMETER = 0x17  # EIATTR_KPARAM_INFO
_WITH_SIZE = 0x04  # the format of an attribute that says how long it is; others have 2 bytes of value


def parameter_sizes(cubin: bytes, kernel: str) -> list[int]:
    """Bytes of each parameter of a kernel, in order.

    Raises:
        ValueError: the file has no such kernel.
    """
    info = _section(cubin, f".nv.info.{kernel}")
    sizes, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _WITH_SIZE:
            continue
        if attribute == _KERNEL_PARAMETER:
            _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at)
            sizes[ordinal] = packed >> 18
        at += size
    return [sizes[ordinal] for ordinal in sorted(sizes)]


def _section(elf: bytes, name: str) -> bytes:
    (table,), (entry_size, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    first_name = headers[names][4]
    for start, _, _, _, offset, size in headers:
        at = first_name + start
        if elf[at : elf.index(b"\0", at)].decode() == name:
            return elf[offset : offset + size]
    raise ValueError(f"the cubin has no section {name}")
