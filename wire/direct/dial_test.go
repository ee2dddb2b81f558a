package direct

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"testing"

	"tacit.dev/identity"
)

// serveAll accepts until the listener is closed, and tells how each handshake went.
func (w *world) serveAll(t *testing.T) <-chan error {
	results := make(chan error, 100)
	done := make(chan struct{})
	t.Cleanup(func() { w.l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			ss, err := w.l.AcceptTCP()
			if err != nil {
				return
			}
			s, _, err := Server(soon(t), ss, w.tls.Server(w.server))
			if err == nil {
				err = s.Reply(Reply{})
			}
			results <- err
		}
	}()
	return results
}

// Dial resumes with P-256, and begins anew with X25519MLKEM768 when the server has
// forgotten the session: the caller sees one connection each time.
func TestDial(t *testing.T) {
	w := newWorld(t)
	served := w.serveAll(t)
	dials := 0
	dial := func(context.Context) (*net.TCPConn, error) {
		dials++
		return dialTCP(t, w), nil
	}
	renew := func() { w.server = w.ca.leaf(t, idServer) }
	rows := []struct {
		name    string
		before  func()
		resumed bool
		dials   int
		curve   tls.CurveID
		served  []string
	}{
		{"first", func() {}, false, 1, tls.X25519MLKEM768, []string{""}},
		{"again", func() {}, true, 1, tls.CurveP256, []string{""}},
		{"and again, with the same ticket", func() {}, true, 1, tls.CurveP256, []string{""}},
		{"the server is another process", renew, false, 2, tls.X25519MLKEM768, []string{identity.ReasonStaleSession, ""}},
		{"its session", func() {}, true, 1, tls.CurveP256, []string{""}},
	}
	for _, r := range rows {
		r.before()
		dials = 0
		c, err := Dial(soon(t), Way{Connect: dial}, w.clientConfig(), Hello{}, nil)
		must(t, err)
		_, err = c.AwaitReply(soon(t))
		must(t, err)
		if p := c.Peer(); p.Resumed != r.resumed || p.Curve != r.curve || dials != r.dials {
			t.Errorf("%s: %+v after %d dials, want resumed %v, %v after %d", r.name, p, dials, r.resumed, r.curve, r.dials)
		}
		var got []string
		for range r.dials {
			got = append(got, identity.Reason(<-served))
		}
		if !slices.Equal(got, r.served) {
			t.Errorf("%s: the server says %q, want %q", r.name, got, r.served)
		}
		must(t, c.Abort())
	}
}

func TestDialErrors(t *testing.T) {
	w := newWorld(t)
	want := errors.New("no route")
	_, err := Dial(soon(t), Way{Connect: func(context.Context) (*net.TCPConn, error) { return nil, want }}, w.clientConfig(), Hello{}, nil)
	if err != want {
		t.Errorf("%v: want %v", err, want)
	}
}
