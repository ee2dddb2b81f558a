package admin

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func newTestLog(t testing.TB, to io.Writer) *Log {
	t.Helper()
	l, err := NewLog(LogConfig{Format: "text", Level: "info", To: to})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLogIsWrittenInOrderAndToItsEnd(t *testing.T) {
	var b bytes.Buffer
	l := newTestLog(t, &b)
	l.Info("before")
	failed := errors.New("what was run")
	err := l.While(func() error {
		for range 1000 {
			l.Info("line")
		}
		l.Info("last")
		return failed
	})
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if err != failed || len(lines) != 1002 || !strings.Contains(lines[0], "before") || !strings.Contains(lines[1001], "last") {
		t.Errorf("%v, %d lines, from %q to %q", err, len(lines), lines[0], lines[len(lines)-1])
	}
	if n := testutil.ToFloat64(l.queue.lost); n != 0 {
		t.Errorf("%v lines lost", n)
	}
}

// stuck is a pipe that is full and that nobody reads.
func stuck(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	w.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
	for err == nil {
		_, err = w.Write(make([]byte, 4096))
	}
	w.SetWriteDeadline(time.Time{})
	return r, w
}

// A log that nobody reads stops nobody who logs; what is lost is counted, and told
// when somebody reads again.
func TestLogThatIsNotRead(t *testing.T) {
	r, w := stuck(t)
	l := newTestLog(t, w)
	var told bytes.Buffer
	reading := make(chan struct{})
	l.While(func() error {
		line := strings.Repeat("x", 1000)
		for range 3 * logQueue / len(line) {
			l.Info(line)
		}
		lost := testutil.ToFloat64(l.queue.lost)
		l.queue.mu.Lock() // the writer has another turn as late as it likes
		waiting := len(l.queue.waiting)
		l.queue.mu.Unlock()
		if lost < 1000 || waiting > logQueue {
			t.Errorf("%v lines lost, %d bytes wait: want at most %d", lost, waiting, logQueue)
		}
		go func() {
			defer close(reading)
			io.Copy(&told, r)
		}()
		return nil
	})
	w.Close()
	<-reading
	if !strings.Contains(told.String(), "lines of the log were lost") {
		t.Error("nobody is told that lines are lost")
	}
}

func TestLogEndsThoughItIsNotRead(t *testing.T) {
	_, w := stuck(t)
	began := time.Now()
	l := newTestLog(t, w)
	l.While(func() error { l.Info("nobody reads this"); return nil })
	if took := time.Since(began); took > 2*farewell {
		t.Errorf("it took %v to end", took)
	}
}

// A pipe that is closed is no reason to end either.
func TestLogThatIsClosed(t *testing.T) {
	r, w := stuck(t)
	r.Close()
	l := newTestLog(t, w)
	l.While(func() error { l.Info("one"); return nil })
	if n := testutil.ToFloat64(l.queue.lost); n != 1 {
		t.Errorf("%v lines lost, want 1", n)
	}
}

func TestLogRefuses(t *testing.T) {
	for _, cfg := range []LogConfig{{Format: "xml", Level: "info"}, {Format: "json", Level: "loud"}} {
		if _, err := NewLog(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}

// What a burst took is given back when it is over.
func TestLogGivesMemoryBack(t *testing.T) {
	l := newTestLog(t, io.Discard)
	kept := func() int { return cap(l.queue.waiting) + cap(l.queue.spare) }
	for range 2 {
		l.Info(strings.Repeat("x", logQueue/2))
		l.queue.flush()
	}
	l.queue.trim()
	if kept() < logQueue {
		t.Errorf("%d bytes are kept in a burst", kept())
	}
	l.queue.trim()
	if kept() > 2*logKeep {
		t.Errorf("%d bytes are kept after a burst", kept())
	}
}

// The queue costs no allocation per line.
func TestLogAllocatesNothing(t *testing.T) {
	l := newTestLog(t, io.Discard)
	l.While(func() error {
		line := []byte(strings.Repeat("x", 400) + "\n")
		if n := testing.AllocsPerRun(1000, func() { l.queue.Write(line) }); n > 0 {
			t.Errorf("%v allocations per line", n)
		}
		return nil
	})
}

// writes counts them.
type writes struct{ n, lines int }

func (w *writes) Write(p []byte) (int, error) {
	w.n++
	w.lines += bytes.Count(p, []byte("\n"))
	return len(p), nil
}

// A line is written at once, and those that follow soon together.
func TestLogIsWrittenInParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &writes{}
		l := newTestLog(t, w)
		l.While(func() error {
			l.Info("first")
			synctest.Wait()
			if w.n != 1 {
				t.Errorf("the first line took %d writes", w.n)
			}
			for range 1000 {
				time.Sleep(time.Millisecond)
				l.Info("line")
			}
			return nil
		})
		if most := int(time.Second/logPause) + 2; w.lines != 1001 || w.n > most {
			t.Errorf("%d lines in %d writes: want 1001 in %d", w.lines, w.n, most)
		}
	})
}
