template <typename T, int COLUMNS>
[[kernel]] void custom_kernel_row_sums__bfloat16_t_1000_bfloat16_t_float(
  const device bfloat16_t* x [[buffer(0)]],
  device float* sums [[buffer(1)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint simdgroups_per_threadgroup [[simdgroups_per_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
  uint3 threads_per_threadgroup [[threads_per_threadgroup]]) {
    // The sum of each row of x (rows, COLUMNS), one threadgroup a row: every byte is read once, so that its time
    // is that of the memory. `macrame kernels` measures with it what a chip's memory gives.
    threadgroup float partial[32];
    const uint row = threadgroup_position_in_grid.x;
    const device T* source = x + ulong(row) * COLUMNS;
    float sum = 0.0f;
    for (uint i = thread_index_in_threadgroup; i < uint(COLUMNS); i += threads_per_threadgroup.x) {
        sum += float(source[i]);
    }
    sum = simd_sum(sum);
    if (thread_index_in_simdgroup == 0) {
        partial[simdgroup_index_in_threadgroup] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup_index_in_threadgroup == 0) {
        sum = thread_index_in_simdgroup < simdgroups_per_threadgroup ? partial[thread_index_in_simdgroup] : 0.0f;
        sum = simd_sum(sum);
        if (thread_index_in_simdgroup == 0) {
            sums[row] = sum;
        }
    }

}

template [[host_name("custom_kernel_row_sums__bfloat16_t_1000_bfloat16_t_float")]] [[kernel]] decltype(custom_kernel_row_sums__bfloat16_t_1000_bfloat16_t_float<bfloat16_t, 1000>) custom_kernel_row_sums__bfloat16_t_1000_bfloat16_t_float<bfloat16_t, 1000>;
