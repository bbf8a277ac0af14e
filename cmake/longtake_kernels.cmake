# longtake_kernels: the GPU's side of src/core. Needs nothing but the CUDA toolkit.
set(core ${PROJECT_SOURCE_DIR}/src/core)
add_library(longtake_kernels STATIC
  ${core}/attention/page_lists.cu
  ${core}/attention/paged_attention.cu
  ${core}/attention/paged_attention_sm80.cu
  ${core}/base/error.cpp
)
# What only Hopper has compiles for nothing else.
add_library(longtake_kernels_sm90 OBJECT ${core}/attention/paged_attention_sm90.cu)
set_target_properties(longtake_kernels_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_sources(longtake_kernels PRIVATE $<TARGET_OBJECTS:longtake_kernels_sm90>)
foreach(target longtake_kernels longtake_kernels_sm90)
  target_include_directories(${target} PUBLIC ${core})
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo>")
  target_link_libraries(${target} PUBLIC CUDA::cudart_static PRIVATE longtake_options)
endforeach()

if(LONGTAKE_TESTS)
  enable_testing()
  find_package(GTest)
  if(GTest_FOUND)
    # Without a GPU every test says that it was skipped.
    foreach(name paged_attention page_lists)
      longtake_test(${name}_test SOURCES ${PROJECT_SOURCE_DIR}/tests/${name}_test.cpp LIBS longtake_kernels LABELS gpu)
    endforeach()
  else()
    message(STATUS "GoogleTest was not found: the kernels are built without their tests")
  endif()
endif()
if(LONGTAKE_BENCH)
  add_executable(paged_attention_bench ${PROJECT_SOURCE_DIR}/bench/paged_attention_bench.cpp)
  target_link_libraries(paged_attention_bench PRIVATE longtake_kernels CUDA::cublas longtake_options)
endif()
