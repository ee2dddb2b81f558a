package kube

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes/fake"
)

// contender is one process in an election.
type contender struct {
	e       *Election
	address string
	leads   chan struct{} // one word per lead
	fail    chan error    // ends a lead
	heard   chan string
	stop    func()
}

func contend(t *testing.T, client *fake.Clientset, name string) *contender {
	c := &contender{
		e: NewElection(ElectionConfig{Client: client, Namespace: "tacit-system", Name: name}), address: name + ":15010",
		leads: make(chan struct{}, 10), fail: make(chan error), heard: make(chan string, 100),
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.e.Run(ctx, c.address, c.lead, func(leader string) { c.heard <- leader }) })
	c.stop = func() { cancel(); running.Wait() }
	t.Cleanup(c.stop)
	return c
}

func (c *contender) lead(ctx context.Context, leads func() bool) error {
	if !leads() {
		return errors.New("leads, and does not")
	}
	c.leads <- struct{}{}
	select {
	case <-ctx.Done():
		return nil
	case err := <-c.fail:
		return err
	}
}

func (c *contender) awaitLead(t *testing.T, within time.Duration) {
	t.Helper()
	select {
	case <-c.leads:
	case <-time.After(within):
		t.Fatalf("%s does not lead after %v", c.address, within)
	}
}

func (c *contender) awaitHeard(t *testing.T, leader string) {
	t.Helper()
	for limit := time.After(20 * time.Second); ; {
		select {
		case l := <-c.heard:
			if l == leader {
				return
			}
		case <-limit:
			t.Fatalf("%s has not heard of %q", c.address, leader)
		}
	}
}

// One leads, the other knows where; who ends lets go of the lead at once.
func TestElection(t *testing.T) {
	client := fake.NewClientset()
	a := contend(t, client, "a")
	a.awaitLead(t, 20*time.Second)
	b := contend(t, client, "b")
	b.awaitHeard(t, "a:15010")
	began := time.Now()
	a.stop()
	b.awaitLead(t, leaseLife-time.Second)
	t.Logf("taken over after %v", time.Since(began))
	b.awaitHeard(t, "b:15010")
}

// A lead that fails is let go of, and tried for again.
func TestElectionAfterFailure(t *testing.T) {
	client := fake.NewClientset()
	a := contend(t, client, "a")
	a.awaitLead(t, 20*time.Second)
	b := contend(t, client, "b")
	b.awaitHeard(t, "a:15010")
	a.fail <- errors.New("full disk")
	b.awaitLead(t, leaseLife-time.Second)
	b.fail <- errors.New("full disk, too")
	a.awaitLead(t, 20*time.Second)
}
