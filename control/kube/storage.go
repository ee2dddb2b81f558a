package kube

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// The ConfigMaps of a Storage.
const (
	// BundleMap holds the roots of the mesh under the key bundle.pem: nodes mount it.
	BundleMap = "tacit-bundle"
	// capturedMap begins the names of those that hold what control remembers of captured
	// pods, compressed: a ConfigMap takes 1 MiB, so there are Shards of them.
	capturedMap = "tacit-captured"
	capturedKey = "captured.json.gz"
	// maxCaptured bounds what is unpacked of one, in bytes.
	maxCaptured = 8 << 20

	// LabelCaptured is a label of all ConfigMaps of captured pods.
	LabelCaptured = "tacit.dev/captured"
	// Shards is how many parts there are of what control remembers of captured pods. Another
	// number would be another place for what is kept.
	Shards = 64
	// loaders is how many are read at once.
	loaders = 8
)

// CapturedMap is the name of the ConfigMap that holds a shard.
func CapturedMap(shard int) string { return fmt.Sprintf("%s-%d", capturedMap, shard) }

// Storage keeps in ConfigMaps what control must not forget. One process may write it
// at a time. Save and PublishBundle may be called at once, but not for one shard.
type Storage struct {
	client    kubernetes.Interface
	namespace string
	// versions of the ConfigMaps with captured pods when they were last read or
	// written: who has become the writer meanwhile is not overwritten.
	versions [Shards]string
}

// NewStorage reads nothing. It needs create of configmaps in the namespace, and get
// and update of tacit-bundle and of each CapturedMap.
func NewStorage(c kubernetes.Interface, namespace string) *Storage {
	return &Storage{client: c, namespace: namespace}
}

func (s *Storage) String() string { return "ConfigMaps " + s.namespace + "/" + capturedMap + "-*" }

// Load returns what was saved last, by shard; what was never saved is nil.
func (s *Storage) Load() (shards [Shards][]byte, err error) {
	var g errgroup.Group
	g.SetLimit(loaders)
	for i := range shards {
		g.Go(func() (err error) {
			shards[i], err = s.load(i)
			return err
		})
	}
	return shards, g.Wait()
}

func (s *Storage) load(shard int) ([]byte, error) {
	m, err := s.get(CapturedMap(shard))
	if m == nil || err != nil {
		s.versions[shard] = ""
		return nil, err
	}
	r, err := gzip.NewReader(bytes.NewReader(m.BinaryData[capturedKey]))
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", s.namespace, m.Name, err)
	}
	b, err := io.ReadAll(io.LimitReader(r, maxCaptured+1))
	if err == nil && len(b) > maxCaptured {
		err = fmt.Errorf("more than %d bytes", maxCaptured)
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", s.namespace, m.Name, err)
	}
	s.versions[shard] = m.ResourceVersion
	return b, nil
}

// Save keeps b as a shard. The error wraps fs.ErrExist if another process has saved it since
// Load or the last Save.
func (s *Storage) Save(shard int, b []byte) error {
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(b); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	m := s.configMap(CapturedMap(shard))
	m.Labels[LabelCaptured] = "shard"
	m.ResourceVersion = s.versions[shard]
	m.BinaryData = map[string][]byte{capturedKey: packed.Bytes()}
	m, err := s.put(m)
	if err != nil {
		return err
	}
	s.versions[shard] = m.ResourceVersion
	return nil
}

// PublishBundle writes the ConfigMap that nodes mount.
func (s *Storage) PublishBundle(bundle []byte) error {
	m, err := s.get(BundleMap)
	if err != nil || m != nil && m.Data["bundle.pem"] == string(bundle) {
		return err
	}
	if m == nil {
		m = s.configMap(BundleMap)
	}
	m.Data = map[string]string{"bundle.pem": string(bundle)}
	_, err = s.put(m)
	return err
}

// Close has nothing to let go of.
func (s *Storage) Close() error { return nil }

func (s *Storage) configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
		Namespace: s.namespace, Name: name, Labels: map[string]string{"app.kubernetes.io/part-of": "tacit"},
	}}
}

// get is nil, and no error, if there is no such ConfigMap.
func (s *Storage) get(name string) (*corev1.ConfigMap, error) {
	ctx, cancel := context.WithTimeout(context.Background(), requestLimit)
	defer cancel()
	m, err := s.client.CoreV1().ConfigMaps(s.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", s.namespace, name, err)
	}
	return m, nil
}

// put creates m if it has no version, and else replaces that version.
func (s *Storage) put(m *corev1.ConfigMap) (*corev1.ConfigMap, error) {
	ctx, cancel := context.WithTimeout(context.Background(), requestLimit)
	defer cancel()
	maps, name := s.client.CoreV1().ConfigMaps(s.namespace), m.Name
	var err error
	if m.ResourceVersion == "" {
		m, err = maps.Create(ctx, m, metav1.CreateOptions{})
	} else {
		m, err = maps.Update(ctx, m, metav1.UpdateOptions{})
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("ConfigMap %s/%s was changed by another process: %w", s.namespace, name, fs.ErrExist)
	}
	if err != nil {
		return nil, fmt.Errorf("write ConfigMap %s/%s: %w", s.namespace, name, err)
	}
	return m, nil
}
