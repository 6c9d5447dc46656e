"""Generated Metal source -> a C++ file for the emulator. The body stays as it is but for one word:
`threadgroup` before a variable becomes its storage. Values only, any thread.
"""

from __future__ import annotations

import re

from kernels.msl_text import Generated

DECLARATION = re.compile(r"((?:^|[;{}])\s*)threadgroup\s+([^;()]*;)", flags=re.M)
_NAME = re.compile(r"(\w+)\s*(?:\[[^\]]*\]\s*)*(?=,|$)")


def with_storage(source: str) -> str:
    """`threadgroup T name[..];` as a statement is storage that the threadgroup shares; before a pointer the
    word only says where it points to. Lines stay where they are."""

    def declare(match: re.Match[str]) -> str:
        declared = re.split(r"[=;]", match[2])[0].strip()
        if "*" in declared or "&" in declared:
            return match[0]
        names = _names(declared)
        storage = f"msl_{names[0]}"
        return (
            f"{match[1]}static struct {{ alignas(16) unsigned char before[msl::ROOM_BYTES]; {match[2]} "
            f"unsigned char behind[msl::ROOM_BYTES]; }} {storage}; "
            f'msl::is_threadgroup(&{storage}, {storage}.behind, "{", ".join(names)}");'
            + "".join(f" auto& {name} = {storage}.{name};" for name in names)
        )

    return DECLARATION.sub(declare, source)


def _names(declared: str) -> list[str]:
    """`float a[3], b` -> a, b. A comma inside <> or [] separates nothing."""
    flat = declared
    while (inner := re.sub(r"<[^<>]*>", "", flat)) != flat:
        flat = inner
    return [match[1] for match in _NAME.finditer(flat)]


def cpp(generated: Generated, file_name: str) -> str:
    """A file whose function launch() takes buffers in the order of the generated signature.

    `file_name` is what messages call the body."""
    entry = generated.text.index("[[kernel]] void ")
    start = generated.text.index(") {\n", entry) + len(") {\n")
    head, body = generated.text[:start], generated.text[start:]
    body = body.partition("\ntemplate [[host_name(")[0]  # launch() instantiates it
    arguments: list[str] = []
    num_buffers = 0
    for p in generated.parameters:
        if p.kind == "attribute":
            arguments.append(f"a.{p.operand}")
            continue
        place = f"b[{num_buffers}]"
        arguments.append(f"({p.c_type}){place}" if p.c_type.endswith("*") else f"*({p.c_type[:-1]}*){place}")
        num_buffers += 1
    return f"""#include "msl.h"
#line 1 "generated.metal"
{with_storage(head)}
#line 1 "{file_name}"
{with_storage(body)}
#line 1 "launch.cpp"
#define MSL_EXPORT extern "C" __attribute__((visibility("default")))
MSL_EXPORT MSL_NO_SANITIZER int launch(void** b, const int* grid, const int* size, int order, unsigned seed,
                                       char* stacks, long* statistics) {{
  int status = msl::dispatch(grid, size, order, seed, stacks, [=](msl::Attributes& a) {{
    {generated.entry}{generated.arguments}({", ".join(arguments)});
  }});
  statistics[0] = msl::num_switches;
  statistics[1] = msl::num_barriers;
  return status;
}}
MSL_EXPORT const char* last_error() {{ return msl::error; }}
"""
