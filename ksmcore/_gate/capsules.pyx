"""What a DLPack capsule says of its memory, and the hold on it. Read here, since NumPy's reader knows neither bfloat16
nor, in its older releases, memory that may not be written.

The layout is that of DLPack 1.x; the one before it is told by the capsule's name.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

cdef struct dl_tensor:
    void* data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides          # in elements; NULL: as in C
    uint64_t byte_offset

cdef struct dl_managed:
    dl_tensor tensor
    void* context
    void (*deleter)(dl_managed*) noexcept

cdef struct dl_versioned:
    uint32_t major
    uint32_t minor
    void* context
    void (*deleter)(dl_versioned*) noexcept
    uint64_t flags
    dl_tensor tensor

cdef int CPU = 1
cdef uint32_t KNOWN_MAJOR = 1
cdef uint64_t IS_COPIED = 2


cdef class CapsuleMemory:
    """The memory of one capsule, which is used up; held until this is collected.

    ValueError where it is not the processor's, or a copy that was made for the capsule.
    """

    cdef dl_managed* managed
    cdef dl_versioned* versioned
    cdef readonly uintptr_t addr         # of the first byte that an element has
    cdef readonly size_t len_bytes       # up to the last one, gaps between elements included

    def __cinit__(self, capsule):
        cdef dl_tensor* tensor
        if PyCapsule_IsValid(capsule, "dltensor_versioned"):
            self.versioned = <dl_versioned*>PyCapsule_GetPointer(capsule, "dltensor_versioned")
            if self.versioned.major != KNOWN_MAJOR:
                # What follows the version may lie elsewhere; the capsule's owner lets go of it.
                major, self.versioned = self.versioned.major, NULL
                raise ValueError(f"its DLPack capsule has version {major}, which is not known")
            PyCapsule_SetName(capsule, "used_dltensor_versioned")
            if self.versioned.flags & IS_COPIED:
                raise ValueError("it hands out copies only")
            tensor = &self.versioned.tensor
        else:
            # ValueError where it is no such capsule at all, or was used before.
            self.managed = <dl_managed*>PyCapsule_GetPointer(capsule, "dltensor")
            PyCapsule_SetName(capsule, "used_dltensor")
            tensor = &self.managed.tensor
        if tensor.device_type != CPU:
            raise ValueError(f"it is on a device of kind {tensor.device_type}")
        self.measure(tensor)

    cdef int measure(self, dl_tensor* tensor) except -1:
        cdef int64_t low = 0, high = 0, step = 1
        cdef size_t item_bits = <size_t>tensor.bits * tensor.lanes
        cdef int n
        self.addr = <uintptr_t>tensor.data + tensor.byte_offset
        for n in range(tensor.ndim - 1, -1, -1):
            if tensor.shape[n] == 0:
                return 0
            if tensor.strides != NULL:
                step = tensor.strides[n]
            if step < 0:
                low += (tensor.shape[n] - 1) * step
            else:
                high += (tensor.shape[n] - 1) * step
            step *= tensor.shape[n]
        self.addr += low * <int64_t>(item_bits // 8)
        self.len_bytes = <size_t>(high - low + 1) * item_bits // 8
        return 0

    def __dealloc__(self):
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)
        if self.managed != NULL and self.managed.deleter != NULL:
            self.managed.deleter(self.managed)
