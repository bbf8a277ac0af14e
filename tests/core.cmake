# Tests of the core library.
find_package(hwy REQUIRED CONFIG)

longtake_test(core_base_test SOURCES core_base_test.cpp LIBS longtake_core)
longtake_test(core_ops_test SOURCES core_ops_test.cpp LIBS longtake_core)
longtake_test(core_attention_test SOURCES core_attention_test.cpp LIBS longtake_core hwy::hwy)
longtake_test(core_kv_test SOURCES core_kv_test.cpp LIBS longtake_core)
if(LONGTAKE_HAS_CUDA)
  longtake_test(select_cuda_test SOURCES select_cuda_test.cpp LIBS longtake_core CUDA::cudart_static LABELS gpu)
  longtake_test(attend_cuda_test SOURCES attend_cuda_test.cpp LIBS longtake_core CUDA::cudart_static LABELS gpu)
  longtake_test(device_cache_test SOURCES device_cache_test.cpp LIBS longtake_core CUDA::cudart_static LABELS gpu)
endif()
