"""What the device computes beside the model, each kernel with a NumPy twin that gives the same bits.

Each module holds one family: the kernels' source, the twin, and the call on the device. The twins
need no device; they are also what a host without one computes with. `zerompi.device.compiler`
compiles and launches the kernels. Arrays are flat; bfloat16, which NumPy lacks, is uint16 of its
bits. Where two results are called the same bits, any NaN equals any other. `summation_on_host`
is what is compiled for the host.
"""
