# Android 5 (API level 21) or newer on 64-bit ARM.
set(EDGE_WHEEL_TAGS android_21_arm64_v8a)
set(ANDROID_ABI arm64-v8a)
set(android_cpu aarch64)
include(${CMAKE_CURRENT_LIST_DIR}/android/android.cmake)
