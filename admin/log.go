package admin

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

const (
	// logQueue bounds what waits to be written, in bytes: some 2,000 lines.
	logQueue = 1 << 20
	// logKeep is how large a buffer may stay after a burst, in bytes. logTrim is how often
	// that is looked at.
	logKeep = 64 << 10
	logTrim = 10 * time.Second
	// logPause is how long what follows a line that was just written waits for more: each
	// write wakes who reads, and each wait for the next line a thread.
	logPause = 20 * time.Millisecond
)

// LogConfig is how a process tells of itself.
type LogConfig struct {
	// Format is text or json; Level is debug, info, warn or error.
	Format, Level string
	// To takes the lines; one goroutine writes. nil means the process's stderr.
	To io.Writer
	// Registry gets the counter of lines lost. nil means nobody does.
	Registry prometheus.Registerer
}

// Log is the log of a process. Lines wait in a bounded queue for one goroutine that
// writes them: whoever logs never waits for whoever reads. If the queue is full,
// lines are lost and counted.
type Log struct {
	*slog.Logger
	queue *logQueued
}

// NewLog starts nothing: lines wait for While.
func NewLog(cfg LogConfig) (*Log, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		return nil, fmt.Errorf("--log-level: %w", err)
	}
	if cfg.To == nil {
		cfg.To = stderr()
	}
	q := &logQueued{to: cfg.To, filled: make(chan struct{}, 1), lost: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_log_lines_lost_total",
		Help: "Lines of the log, those of the access log too, that were dropped because they were not read fast enough.",
	})}
	if cfg.Registry != nil {
		cfg.Registry.MustRegister(q.lost)
	}
	o := slog.HandlerOptions{Level: level}
	switch cfg.Format {
	case "json":
		return &Log{slog.New(slog.NewJSONHandler(q, &o)), q}, nil
	case "text":
		return &Log{slog.New(slog.NewTextHandler(q, &o)), q}, nil
	}
	return nil, fmt.Errorf("--log-format %q: want json or text", cfg.Format)
}

// stderr is another descriptor of it, since Go ends a process that writes to a closed
// pipe by descriptor 2: connections must not end because nobody reads the log.
func stderr() io.Writer {
	fd, err := unix.FcntlInt(os.Stderr.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return os.Stderr
	}
	return os.NewFile(uintptr(fd), "stderr")
}

// While writes the log for as long as f runs, and what is left after it if that is
// read within a moment. It returns f's error.
func (l *Log) While(f func() error) error {
	ended, done := make(chan struct{}), make(chan struct{})
	go l.write(ended, done)
	defer func() {
		close(ended)
		select {
		case <-done:
		case <-time.After(farewell): // it hangs in a write that nothing but the process's end ends
		}
	}()
	return f()
}

// write writes what comes until ended is closed, and closes done.
func (l *Log) write(ended <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	trim := time.NewTicker(logTrim)
	defer trim.Stop()
	more := time.NewTimer(0)
	defer more.Stop()
	for over := false; !over; {
		select {
		case <-trim.C:
			l.queue.trim()
		case <-l.queue.filled:
		case <-ended:
			over = true
		}
		if lost := l.queue.flush(); lost > 0 {
			l.Warn("lines of the log were lost: it is not read fast enough", "lines", lost)
		}
		more.Reset(logPause)
		select {
		case <-more.C:
		case <-ended:
			over = true
		}
	}
	l.queue.flush()
}

// logQueued is the queue, as what a slog.Handler writes its lines to.
type logQueued struct {
	to     io.Writer
	filled chan struct{} // has one element when something waits
	lost   prometheus.Counter

	// mu guards what follows.
	mu      sync.Mutex
	waiting []byte
	spare   []byte // takes the place of waiting while that is written
	missed  int    // lines lost since the last flush
	peak    int    // the largest batch since the last trim
}

// Write never blocks and never fails: a lost line is none of its caller's business.
func (q *logQueued) Write(line []byte) (int, error) {
	q.mu.Lock()
	fits := len(q.waiting)+len(line) <= logQueue
	if fits {
		q.waiting = append(q.waiting, line...)
	} else {
		q.missed++
	}
	q.mu.Unlock()
	if !fits {
		q.lost.Inc()
		return len(line), nil
	}
	select {
	case q.filled <- struct{}{}:
	default:
	}
	return len(line), nil
}

// flush writes all that waits, and says how many lines were lost before.
func (q *logQueued) flush() (lost int) {
	q.mu.Lock()
	batch := q.waiting
	q.waiting, q.spare = q.spare[:0], nil
	q.mu.Unlock()
	if n, err := q.to.Write(batch); err != nil && len(batch) > 0 {
		q.lost.Add(float64(bytes.Count(batch[n:], []byte("\n"))))
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.spare, q.peak = batch, max(q.peak, len(batch))
	lost, q.missed = q.missed, 0
	return lost
}

// trim gives back what a burst took that is over.
func (q *logQueued) trim() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.peak <= logKeep {
		q.spare = shrunk(q.spare)
		if len(q.waiting) == 0 {
			q.waiting = shrunk(q.waiting)
		}
	}
	q.peak = 0
}

func shrunk(b []byte) []byte {
	if cap(b) > logKeep {
		return nil
	}
	return b
}
