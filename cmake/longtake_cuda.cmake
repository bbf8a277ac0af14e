# Decides whether the CUDA twins are built; writes the answer into build_config.h.
set(LONGTAKE_HAS_CUDA OFF)
if(LONGTAKE_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  # The switch turns on when the first .cu file is listed; a toolkit alone changes nothing.
  get_property(LONGTAKE_CUDA_SOURCES GLOBAL PROPERTY LONGTAKE_CUDA_SOURCES)
  if(CMAKE_CUDA_COMPILER AND LONGTAKE_CUDA_SOURCES)
    enable_language(CUDA)
    set(LONGTAKE_HAS_CUDA ON)
  endif()
endif()
