package relay

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is how many bytes a splice carries at once. Pipes count against
	// fs.pipe-user-pages-soft of an unprivileged user (64 MiB by default).
	pipeSize = 256 << 10
	// idlePipes is how many pipes a pool keeps; it closes what comes back above.
	idlePipes = 128
	// maxLarge bounds the large buffers that are lent at once, to 31 MB: they are
	// held while the other side takes nothing, and there may be many such sides.
	maxLarge = 128
	// plenty is how many bytes of one read promise more.
	plenty = BufferSize / 2
)

type (
	buffer      [BufferSize]byte
	largeBuffer [LargeBufferSize]byte
)

// pipe is empty whenever it lies in a pool.
type pipe struct{ r, w int }

// Pool lends what a connection needs only while its bytes move: buffers, and
// pipes to splice through. It is safe for concurrent use.
type Pool struct {
	buffers sync.Pool    // of *buffer
	large   sync.Pool    // of *largeBuffer
	lent    atomic.Int32 // of large

	mu     sync.Mutex
	pipes  []*pipe // guarded by mu
	closed bool    // guarded by mu
}

// NewPool returns an empty pool. Close releases its pipes.
func NewPool() *Pool {
	return &Pool{
		buffers: sync.Pool{New: func() any { return new(buffer) }},
		large:   sync.Pool{New: func() any { return new(largeBuffer) }},
	}
}

// Close releases the pipes that the pool keeps, and those that come back later.
// Joins that still run are not disturbed.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, q := range p.pipes {
		q.close()
	}
	p.pipes = nil
}

// buffer lends a buffer: a large one if that is wished and to be had.
func (p *Pool) buffer(large bool) []byte {
	if large && p.lent.Add(1) <= maxLarge {
		return p.large.Get().(*largeBuffer)[:]
	}
	if large {
		p.lent.Add(-1)
	}
	return p.buffers.Get().(*buffer)[:]
}

// keepBuffer takes back what buffer lent, whole.
func (p *Pool) keepBuffer(b []byte) {
	if len(b) == LargeBufferSize {
		p.large.Put((*largeBuffer)(b))
		p.lent.Add(-1)
		return
	}
	p.buffers.Put((*buffer)(b))
}

// pipe lends an empty pipe, a new one if none lies here.
func (p *Pool) pipe() (*pipe, error) {
	if q := p.idlePipe(); q != nil {
		return q, nil
	}
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	// Refused above the user's limit of pages: then it is the size that it is.
	_, _ = unix.FcntlInt(uintptr(fd[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{r: fd[0], w: fd[1]}, nil
}

func (p *Pool) idlePipe() *pipe {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := len(p.pipes) - 1
	if last < 0 {
		return nil
	}
	q := p.pipes[last]
	p.pipes = p.pipes[:last]
	return q
}

// keepPipe takes back an empty pipe.
func (p *Pool) keepPipe(q *pipe) {
	p.mu.Lock()
	keep := !p.closed && len(p.pipes) < idlePipes
	if keep {
		p.pipes = append(p.pipes, q)
	}
	p.mu.Unlock()
	if !keep {
		q.close()
	}
}

func (q *pipe) close() {
	for _, fd := range []int{q.r, q.w} {
		if err := unix.Close(fd); err != nil {
			panic(fmt.Sprintf("relay: close pipe descriptor %d: %v", fd, err))
		}
	}
}
