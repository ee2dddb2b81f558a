package direct

import (
	"crypto/tls"
	"fmt"
	"io"
	"testing"
	"time"
)

func BenchmarkThroughput(b *testing.B) {
	for _, own := range []bool{true, false} {
		b.Run(map[bool]string{true: "own", false: "crypto_tls"}[own], func(b *testing.B) {
			w := newWorld(b)
			c, s := w.connect(b, own, own)
			done := make(chan error, 1)
			go func() { done <- sink(s) }()
			p := make([]byte, 64<<10)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			b.ResetTimer()
			defer reportCPU(b)()
			for range b.N {
				if _, err := c.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			must(b, c.CloseWrite())
			must(b, <-done)
		})
	}
}

func sink(c *Conn) error {
	buf := make([]byte, 64<<10)
	for {
		if err := c.AwaitReadable(); err != nil {
			return err
		}
		if _, err := c.Read(buf); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	for _, own := range []bool{true, false} {
		b.Run(map[bool]string{true: "own", false: "crypto_tls"}[own], func(b *testing.B) {
			w := newWorld(b)
			c, s := w.connect(b, own, own)
			done := make(chan error, 1)
			go func() {
				buf := make([]byte, 64<<10)
				for {
					_ = s.AwaitReadable()
					n, err := s.Read(buf)
					if err != nil {
						done <- err
						return
					}
					_, _ = s.Write(buf[:n])
				}
			}()
			buf := make([]byte, 64<<10)
			b.ReportAllocs()
			b.ResetTimer()
			defer reportCPU(b)()
			for range b.N {
				if _, err := c.Write(buf[:128]); err != nil {
					b.Fatal(err)
				}
				_ = c.AwaitReadable()
				if _, err := c.Read(buf); err != nil {
					b.Fatal(err)
				}
			}
			must(b, c.CloseWrite())
			<-done
		})
	}
}

// BenchmarkConnect is one TCP connection, handshake, preambles, and its end.
func BenchmarkConnect(b *testing.B) {
	for _, how := range []string{"quick", "resumed", "full"} {
		resumed := how != "full"
		b.Run(how, func(b *testing.B) {
			w := newWorld(b)
			w.connect(b, true, true)
			go func() {
				for {
					ss, err := w.l.AcceptTCP()
					if err != nil {
						return
					}
					s, _, err := Server(b.Context(), ss, w.tls.Server(w.server))
					if err != nil {
						b.Error(err)
						return
					}
					_ = s.Reply(Reply{})
					_ = s.Abort()
				}
			}()
			b.ReportAllocs()
			b.ResetTimer()
			defer reportCPU(b)()
			for range b.N {
				cs := dialTCP(b, w)
				if !resumed {
					w.tls.Forget(idClient)
				}
				c, err := client(b.Context(), cs, w.clientConfig(), opening{hello: Hello{Service: "default/db.default.svc:5432"}},
					side{client: true, own: true, quick: how == "quick"})
				must(b, err)
				_, err = c.AwaitReply(b.Context())
				must(b, err)
				if c.Peer().Resumed != resumed {
					b.Fatal(fmt.Errorf("resumed %v", !resumed))
				}
				must(b, c.Abort())
			}
		})
	}
}

// BenchmarkConnectPlain is what crypto/tls alone needs for the same handshake.
func BenchmarkConnectPlain(b *testing.B) {
	w := newWorld(b)
	w.connect(b, true, true)
	ccfg, scfg := plainConfig(w.clientConfig()), plainConfig(w.tls.Server(w.server))
	go func() {
		for {
			ss, err := w.l.AcceptTCP()
			if err != nil {
				return
			}
			s := tls.Server(ss, scfg)
			if _, err := readHello(s); err != nil {
				b.Error(err)
			}
			_, _ = s.Write(appendReply(nil, Reply{}))
			_ = ss.SetLinger(0)
			_ = ss.Close()
		}
	}()
	hello, _ := appendHello(nil, Hello{Service: "default/db.default.svc:5432"})
	b.ReportAllocs()
	b.ResetTimer()
	defer reportCPU(b)()
	for range b.N {
		cs := dialTCP(b, w)
		c := tls.Client(cs, ccfg)
		_, err := c.Write(hello)
		must(b, err)
		_, err = readReply(c)
		must(b, err)
		_ = cs.SetLinger(0)
		_ = cs.Close()
	}
}

// BenchmarkLook is a look at a ClientHello that is there, as it mostly is on a busy node.
func BenchmarkLook(b *testing.B) {
	w := newWorld(b)
	ours, _ := hellos(b)
	c, s := w.sockets(b)
	_, err := c.Write(ours)
	must(b, err)
	ctx := soon(b)
	for b.Loop() {
		if k, err := Look(ctx, s, time.Second); k != KindDirect || err != nil {
			b.Fatal(k, err)
		}
	}
}
