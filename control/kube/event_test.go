package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A reader that comes when it likes has the objects as they are, and what waits for it is
// never more than what it knows and what there is.
func TestPendingEventsAreFew(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	now, read, pending := make(Set), make(Set), Pending{}
	for n := range 20_000 {
		name := fmt.Sprint("p", random.IntN(8))
		k := Key{"Pod", "default", name}
		e := Event{Key: k}
		if random.IntN(2) == 0 {
			e.Object = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "u"}, Spec: corev1.PodSpec{NodeName: fmt.Sprint(n)}}
		}
		if e.Object != nil || now[k] != nil {
			pending.Put(e, now[k] != nil)
			now.Apply([]Event{e})
		}
		for k := range pending.events {
			if now[k] == nil && read[k] == nil {
				t.Fatalf("%v waits, and is neither there nor known", k)
			}
		}
		if random.IntN(10) == 0 {
			read.Apply(pending.Take())
			if !maps.Equal(now, read) {
				t.Fatalf("read %v, want %v", read, now)
			}
		}
	}
}
