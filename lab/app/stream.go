package app

import (
	"hash/crc32"
	"io"
)

// stream is size bytes that depend on the seed, so that two streams that are mixed
// up, cut or repeated have another checksum.
func stream(size int64, seed byte) io.Reader {
	block := make([]byte, 64<<10)
	x := uint32(seed)*2654435761 + 1
	for i := range block {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		block[i] = byte(x)
	}
	return io.LimitReader(&repeat{block: block}, size)
}

// repeat is one block for ever, with its number in it.
type repeat struct {
	block  []byte
	at     int
	number uint32
}

func (r *repeat) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.at:])
	if r.at += n; r.at == len(r.block) {
		r.at = 0
		r.number++
		r.block[0], r.block[1], r.block[2], r.block[3] = byte(r.number), byte(r.number>>8), byte(r.number>>16), byte(r.number>>24)
	}
	return n, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// drain reads to the end.
func drain(r io.Reader) (n int64, sum uint32, err error) {
	buf := make([]byte, 64<<10)
	for {
		k, err := r.Read(buf)
		n, sum = n+int64(k), crc32.Update(sum, castagnoli, buf[:k])
		if err == io.EOF {
			return n, sum, nil
		}
		if err != nil {
			return n, sum, err
		}
	}
}

// checksum is what drain says of a stream.
func checksum(size int64, seed byte) uint32 {
	_, sum, err := drain(stream(size, seed))
	if err != nil {
		panic("app: a stream without end") // it reads from memory
	}
	return sum
}
