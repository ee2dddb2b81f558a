package proxy

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

var (
	here  = line{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddrPort("10.0.0.2:80")}
	other = line{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddrPort("10.0.0.2:81")}
)

func TestLineOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLines()
		first, second, elsewhere := l.join(here), l.join(here), l.join(other)
		began := time.Now()
		first.await(t.Context())
		elsewhere.await(t.Context())
		time.AfterFunc(time.Millisecond, first.leave)
		second.await(t.Context())
		if took := time.Since(began); took != time.Millisecond {
			t.Errorf("the second went after %v: want 1ms, when the first had left", took)
		}
		second.leave()
		second.leave()
		elsewhere.leave()
		if len(l.last) != 0 {
			t.Errorf("%d lines are left", len(l.last))
		}
	})
}

func TestLineLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLines()
		stuck, second, third := l.join(here), l.join(here), l.join(here)
		began := time.Now()
		second.await(t.Context())
		if took := time.Since(began); took != lineLimit {
			t.Errorf("waited %v for one who is stuck: want %v", took, lineLimit)
		}
		second.leave()
		third.await(t.Context())
		if took := time.Since(began); took != lineLimit {
			t.Errorf("the third went after %v: want %v", took, lineLimit)
		}
		stuck.leave()
		third.leave()
		if len(l.last) != 0 {
			t.Errorf("%d lines are left", len(l.last))
		}
	})
}

func TestLineContext(t *testing.T) {
	l := newLines()
	first, second := l.join(here), l.join(here)
	defer first.leave()
	defer second.leave()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	began := time.Now()
	second.await(ctx)
	if took := time.Since(began); took >= lineLimit {
		t.Errorf("waited %v though ctx had ended", took)
	}
}
