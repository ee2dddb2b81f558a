package kube

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"tacit.dev/mesh"
)

// The ConfigMaps that hold what nodes saw.
const (
	pairsMap = "tacit-pairs"
	pairsKey = "pairs.json.gz"
	// LabelPairs is a label of all of them.
	LabelPairs = "tacit.dev/pairs"
	// PairShards is how many there are.
	PairShards = 16
	// maxPairsPacked bounds what one holds, in bytes: a ConfigMap takes 1 MiB. maxPairsUnpacked
	// is what that may be unpacked.
	maxPairsPacked, maxPairsUnpacked = 900 << 10, 8 << 20
)

// PairShard is a part of what nodes saw. The first has what is not told apart, too.
type PairShard struct {
	Pairs []mesh.Pair `json:"pairs"`
	// Other are connections that nodes had no room to tell apart, Dropped pairs that control
	// had none for.
	Other   uint64 `json:"other,omitempty"`
	Dropped uint64 `json:"dropped,omitempty"`
}

// PairsMap is the name of the ConfigMap that holds a shard.
func PairsMap(shard int) string { return fmt.Sprintf("%s-%d", pairsMap, shard) }

// ErrTooManyPairs says that a shard does not fit into a ConfigMap.
var ErrTooManyPairs = errors.New("more pairs than a ConfigMap takes")

// Pack is the shard as it is stored, or ErrTooManyPairs.
func (s *PairShard) Pack() ([]byte, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err = w.Write(text)
	if err = cmp.Or(err, w.Close()); err != nil {
		return nil, err
	}
	if len(text) > maxPairsUnpacked || packed.Len() > maxPairsPacked {
		return nil, ErrTooManyPairs
	}
	return packed.Bytes(), nil
}

// UnpackPairs is what Pack has packed. It reads a bounded part of whatever else that is.
func UnpackPairs(b []byte) (s PairShard, err error) {
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return s, err
	}
	text, err := io.ReadAll(io.LimitReader(r, maxPairsUnpacked+1))
	if err == nil && len(text) > maxPairsUnpacked {
		err = fmt.Errorf("more than %d bytes", maxPairsUnpacked)
	}
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	for i := 0; err == nil && i < len(s.Pairs); i++ {
		err = s.Pairs[i].Check()
	}
	return s, err
}

// LoadPairs returns what was saved last, by shard; nil is what was never saved.
func (s *Storage) LoadPairs() (shards [PairShards][]byte, err error) {
	for i := range shards {
		m, err := s.get(PairsMap(i))
		if err != nil {
			return shards, err
		}
		if m != nil {
			shards[i] = m.BinaryData[pairsKey]
		}
	}
	return shards, nil
}

// SavePairs keeps b as a shard, in the stead of whatever is there.
func (s *Storage) SavePairs(shard int, b []byte) error {
	m, err := s.get(PairsMap(shard))
	if err != nil {
		return err
	}
	if m == nil {
		m = s.configMap(PairsMap(shard))
	}
	if m.Labels == nil {
		m.Labels = make(map[string]string)
	}
	m.Labels[LabelPairs] = "shard"
	m.BinaryData = map[string][]byte{pairsKey: b}
	_, err = s.put(m)
	return err
}

// ReadPairs is all that control has saved in its namespace, in order. The error wraps
// fs.ErrNotExist if it never has.
func ReadPairs(ctx context.Context, c kubernetes.Interface, namespace string) (all PairShard, err error) {
	maps, err := c.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{LabelSelector: LabelPairs})
	if err != nil {
		return all, fmt.Errorf("list ConfigMaps of namespace %s: %w", namespace, err)
	}
	if len(maps.Items) == 0 {
		return all, fmt.Errorf("no ConfigMap of namespace %s has the label %s: %w", namespace, LabelPairs, fs.ErrNotExist)
	}
	for i := range maps.Items {
		if err := all.add(&maps.Items[i]); err != nil {
			return all, fmt.Errorf("read ConfigMap %s/%s: %w", namespace, maps.Items[i].Name, err)
		}
	}
	slices.SortFunc(all.Pairs, ComparePairs)
	return all, nil
}

func (s *PairShard) add(m *corev1.ConfigMap) error {
	one, err := UnpackPairs(m.BinaryData[pairsKey])
	s.Pairs = append(s.Pairs, one.Pairs...)
	s.Other += one.Other
	s.Dropped += one.Dropped
	return err
}

// ComparePairs orders pairs for people: by destination, port, source and crossing.
func ComparePairs(x, y mesh.Pair) int {
	return cmp.Or(cmp.Compare(x.Destination.String(), y.Destination.String()), cmp.Compare(x.Destination.Account, y.Destination.Account),
		cmp.Compare(x.Port, y.Port), cmp.Compare(x.Source.String(), y.Source.String()), cmp.Compare(x.Source.Account, y.Source.Account),
		cmp.Compare(x.Crossing, y.Crossing), cmp.Compare(x.Reporter, y.Reporter))
}
