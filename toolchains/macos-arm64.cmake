# macOS 11 or newer on Apple silicon.
set(EDGE_WHEEL_TAGS macosx_11_0_arm64)
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(zig_target aarch64-macos.11.0)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
