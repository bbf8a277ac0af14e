# The CUDA kernels that need nothing but the CUDA toolkit: a part of longtake_core, or, with LONGTAKE_KERNELS_ONLY, a
# library of their own with tests and a benchmark, which builds where the other dependencies are missing.
set(core ${PROJECT_SOURCE_DIR}/src/core)
# What only Hopper has compiles for nothing else.
add_library(longtake_kernels_sm90 OBJECT ${core}/attention/paged_attention_sm90.cu)
set_target_properties(longtake_kernels_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_include_directories(longtake_kernels_sm90 PRIVATE ${core})
set(LONGTAKE_KERNEL_SOURCES
  ${core}/attention/page_lists.cu
  ${core}/attention/paged_attention.cu
  ${core}/attention/paged_attention_f32.cu
  ${core}/attention/paged_attention_sm80.cu
  ${core}/attention/prompt_tokens.cu
  ${core}/kv/device_pages.cu
  $<TARGET_OBJECTS:longtake_kernels_sm90>
)
set(LONGTAKE_CUDA_OPTIONS "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo>")
target_compile_options(longtake_kernels_sm90 PRIVATE ${LONGTAKE_CUDA_OPTIONS})
target_link_libraries(longtake_kernels_sm90 PRIVATE CUDA::cudart_static longtake_options)

# longtake_gpu_tests(TARGET): the kernels' tests and benchmark, over the library that holds the kernels.
function(longtake_gpu_tests target)
  # Without a GPU every test says that it was skipped.
  if(LONGTAKE_TESTS AND GTest_FOUND)
    foreach(name paged_attention page_lists)
      longtake_test(${name}_test SOURCES ${PROJECT_SOURCE_DIR}/tests/${name}_test.cpp LIBS ${target} CUDA::cudart_static LABELS gpu)
    endforeach()
  endif()
  if(LONGTAKE_BENCH)
    add_executable(paged_attention_bench ${PROJECT_SOURCE_DIR}/bench/paged_attention_bench.cpp)
    target_link_libraries(paged_attention_bench PRIVATE ${target} CUDA::cudart_static CUDA::cublas longtake_options)
  endif()
endfunction()

if(LONGTAKE_KERNELS_ONLY)
  add_library(longtake_kernels STATIC ${LONGTAKE_KERNEL_SOURCES} ${core}/base/error.cpp)
  target_include_directories(longtake_kernels PUBLIC ${core})
  target_compile_options(longtake_kernels PRIVATE ${LONGTAKE_CUDA_OPTIONS})
  target_link_libraries(longtake_kernels PUBLIC CUDA::cudart_static PRIVATE longtake_options)
  enable_testing()
  find_package(GTest)
  if(NOT GTest_FOUND)
    message(STATUS "GoogleTest was not found: the kernels are built without their tests")
  endif()
  longtake_gpu_tests(longtake_kernels)
endif()
