# Linux on 32-bit ARM, hard float, with glibc 2.17 or newer: 32-bit Raspberry Pi OS.
set(EDGE_WHEEL_TAGS manylinux_2_17_armv7l manylinux2014_armv7l)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR arm)
set(zig_target arm-linux-gnueabihf.2.17)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
