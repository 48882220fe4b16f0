"""The compiled kernels; pyproject.toml says the rest. Without gcc 12 or newer they are left out.

They need a file of their own, because the build passes the source's checksum to the compiler. By it
`model/cpu/native.py` tells a library of this source from one of another.
"""

import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "model/cpu/native.c"
checksum = zlib.crc32((Path(__file__).parent / SOURCE).read_bytes())

setup(
    ext_modules=[
        Extension(
            "maskray_native",
            sources=[SOURCE],
            define_macros=[("SOURCE_CRC32", f"{checksum:#010x}u")],
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fopenmp",
                "-Wno-psabi",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
