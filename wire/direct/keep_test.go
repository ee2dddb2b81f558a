package direct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"
)

// finish ends what a and b carry, on both sides, a first.
func finish(t testing.TB, a, b *Conn) {
	t.Helper()
	for _, x := range [][2]*Conn{{a, b}, {b, a}} {
		must(t, x[0].Finish())
		if n, err := x[1].Read(make([]byte, 10)); n != 0 || err != io.EOF {
			t.Fatalf("after Finish: read %d, %v", n, err)
		}
	}
}

// next carries another one from c to s, up to the reply.
func next(t testing.TB, c, s *Conn, h Hello) {
	t.Helper()
	accepted := make(chan error, 1)
	go func() {
		got, err := s.AwaitNext(soon(t))
		if err == nil && got != h {
			err = fmt.Errorf("hello %+v: want %+v", got, h)
		}
		if err == nil {
			err = s.Reply(Reply{StatusOK, "again"})
		}
		accepted <- err
	}()
	r, err := c.Next(soon(t), h)
	must(t, err)
	must(t, <-accepted)
	if want := (Reply{StatusOK, "again"}); r != want {
		t.Fatalf("reply %+v: want %+v", r, want)
	}
}

// Several connections, one after the other, each with its own preamble, across
// changes of keys, whoever ends first.
func TestKeptConnectionCarriesTheNext(t *testing.T) {
	w := newWorld(t)
	for _, resumed := range []bool{false, true} {
		c, s := w.connect(t, true, true)
		if c.Peer().Resumed != resumed || !c.Keeps() || !s.Keeps() {
			t.Fatalf("resumed %v: want %v; keeps %v, %v", c.Peer().Resumed, resumed, c.Keeps(), s.Keeps())
		}
		c.keep.rekey, s.keep.rekey = 7, 5
		for i := range 10 {
			echo(t, c, s)
			if c.Finished() || s.Finished() {
				t.Fatal("finished though nobody has said so")
			}
			if i%2 == 0 {
				finish(t, c, s)
			} else {
				finish(t, s, c)
			}
			if !c.Finished() || !s.Finished() || !c.IsQuiet() {
				t.Fatalf("finished: client says %v, server %v; quiet %v", c.Finished(), s.Finished(), c.IsQuiet())
			}
			next(t, c, s, Hello{Service: fmt.Sprint("default/db:", i)})
		}
		both(t, c, s, 1<<20) // ends with CloseWrite
		if c.Finished() || s.Finished() {
			t.Error("kept after close_notify")
		}
		must(t, errors.Join(c.Close(), s.Close()))
	}
}

// Who does not know it is never sent an empty record as an end.
func TestFinishIsCloseWriteForOthers(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		c, s := w.connect(t, client, server)
		if keeps := client && server; c.Keeps() != keeps || s.Keeps() != keeps {
			t.Fatalf("keeps: client says %v, server %v: want %v", c.Keeps(), s.Keeps(), keeps)
		}
		if c.Keeps() {
			return
		}
		finish(t, c, s)
		if c.Finished() || s.Finished() {
			t.Error("finished, and cannot be kept")
		}
		must(t, errors.Join(s.Close(), c.Close()))
	})
}

// One side ends for good, the other one would keep: it is over.
func TestEndForGood(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"client", "server"} {
		t.Run(name, func(t *testing.T) {
			c, s := w.connect(t, true, true)
			a, b := c, s
			if name == "server" {
				a, b = s, c
			}
			must(t, b.Finish())
			must(t, a.CloseWrite())
			for _, x := range []*Conn{a, b} {
				if _, err := x.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("read: %v, want io.EOF", err)
				}
				if x.Finished() {
					t.Error("finished, and the peer has ended for good")
				}
			}
			must(t, errors.Join(s.Close(), c.Close()))
		})
	}
}

func TestNothingIsWrittenAfterFinish(t *testing.T) {
	w := newWorld(t)
	c, _ := w.connect(t, true, true)
	must(t, c.Finish())
	if _, err := c.Write([]byte("more")); !errors.Is(err, errFinished) {
		t.Errorf("%v: want %v", err, errFinished)
	}
}

// A connection that the server has given up says so instead of a reply.
func TestNextFails(t *testing.T) {
	w := newWorld(t)
	for name, end := range map[string]func(*Conn) error{
		"reset":        (*Conn).Abort,
		"FIN":          (*Conn).Close,
		"close_notify": (*Conn).CloseWrite,
	} {
		t.Run(name, func(t *testing.T) {
			c, s := w.connect(t, true, true)
			finish(t, c, s)
			go func() { _ = errors.Join(s.AwaitReadable(), end(s)) }()
			if r, err := c.Next(soon(t), Hello{}); err == nil {
				t.Errorf("reply %+v: want an error", r)
			}
			must(t, errors.Join(c.Abort(), s.Abort()))
		})
	}
}

// A server that says nothing is waited for as long as ctx lasts.
func TestNextTimesOut(t *testing.T) {
	w := newWorld(t)
	c, s := w.connect(t, true, true)
	finish(t, c, s)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Next(ctx, Hello{}); !isTimeout(err) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v: want a timeout", err)
	}
}

func TestAwaitNextEnds(t *testing.T) {
	w := newWorld(t)
	rows := map[string]struct {
		end  func(*Conn) error
		want error
	}{
		"orderly":   {func(c *Conn) error { return errors.Join(c.CloseWrite(), c.Close()) }, io.EOF},
		"truncated": {(*Conn).Close, ErrTruncated},
		"late":      {func(*Conn) error { return nil }, os.ErrDeadlineExceeded},
	}
	for name, r := range rows {
		t.Run(name, func(t *testing.T) {
			c, s := w.connect(t, true, true)
			finish(t, c, s)
			must(t, r.end(c))
			patience := 10 * time.Second
			if name == "late" {
				patience = 100 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if _, err := s.AwaitNext(ctx); !errors.Is(err, r.want) || r.want != io.EOF && errors.Is(err, io.EOF) {
				t.Errorf("%v: want %v", err, r.want)
			}
			must(t, errors.Join(s.Abort(), c.Abort()))
		})
	}
}

func TestIsQuiet(t *testing.T) {
	w := newWorld(t)
	for name, end := range map[string]func(*Conn) error{
		"reset":        (*Conn).Abort,
		"FIN":          (*Conn).Close,
		"close_notify": (*Conn).CloseWrite,
		"bytes":        func(c *Conn) error { _, err := c.c.Write([]byte{0}); return err },
	} {
		t.Run(name, func(t *testing.T) {
			c, s := w.connect(t, true, true)
			finish(t, s, c)
			if !c.IsQuiet() {
				t.Fatal("not quiet, and nothing was sent")
			}
			must(t, end(s))
			for end := time.Now().Add(10 * time.Second); c.IsQuiet(); {
				if time.Now().After(end) {
					t.Fatal("still quiet")
				}
			}
			must(t, errors.Join(s.Abort(), c.Abort()))
		})
	}
}
