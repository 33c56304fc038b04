/* The qualifiers of CUDA's headers, which mean nothing to a C compiler. The wheels of torch bring
   every header that runtime.c needs but this one. */
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __cuda_builtin_vector_align8(tag, members) struct tag { members }
#define __cudart_builtin__
#define __device__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __forceinline__ inline
#define __host__
#define __inline__ inline
#define CUDARTAPI
