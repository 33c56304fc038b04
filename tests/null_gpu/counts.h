/* What the stand-in counts; counts.py has the same names in the same order. */
enum Count {
  LAUNCHES,          /* kernels of torch itself */
  MATMULS,           /* calls of cuBLAS */
  TRITON_LAUNCHES,   /* kernels started by the driver: those of Triton */
  TO_DEVICE,         /* copies from the host */
  TO_HOST,           /* copies to the host */
  ON_DEVICE,         /* copies inside the device */
  FILLS,
  STREAM_WAITS,      /* of the host for a stream */
  EVENT_WAITS,
  DEVICE_WAITS,
  ALLOCATIONS,
  BYTES_TO_DEVICE,
  BYTES_TO_HOST,
  BYTES_ON_DEVICE,
  COUNTS
};
extern long counts[COUNTS] __attribute__((weak));
