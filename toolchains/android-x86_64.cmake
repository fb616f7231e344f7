# Android 5 (API level 21) or newer on x86-64: emulators, Chromebooks.
set(EDGE_WHEEL_TAGS android_21_x86_64)
set(ANDROID_ABI x86_64)
set(android_cpu x86_64)
include(${CMAKE_CURRENT_LIST_DIR}/android/android.cmake)
